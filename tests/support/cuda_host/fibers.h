// Runs the threads of a CUDA block, or of a cluster of blocks, as fibers of one thread of the host.
//
// A fiber runs until it waits: at a barrier, in a warp's exchange, for a copy. The next one is always the first in
// `Order` that can go on, so that one warp runs as far ahead of the others as its barriers let it: a barrier that is
// missing, before or behind a write to shared memory, gives wrong results in one order or another.
#pragma once

#include <numeric>
#include <random>
#include <tuple>
#include <utility>

#include "state.h"

namespace cuda_host {

class Cluster {
 public:
  Cluster(unsigned first_block, const std::function<void()>& body)
      : body_(body), generator_(settings.seed + first_block) {
    const unsigned threads = shape.block.x;
    blocks_.resize(shape.cluster);
    fibers_ = std::vector<Fiber>(shape.cluster * threads);
    live_ = static_cast<int>(fibers_.size());
    const std::vector<unsigned> order = ordered(threads);
    for (unsigned b = 0; b < shape.cluster; ++b) {
      Block& block = blocks_[b];
      block.index = first_block + b, block.rank = b, block.live = static_cast<int>(threads);
      block.warps.resize((threads + 31) / 32);
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers_[b * threads + t];
        fiber.cluster = this, fiber.block = &block, fiber.thread = t, fiber.lane = t % 32;
        fiber.warp = &block.warps[t / 32], fiber.position = order[b * threads + t];
      }
    }
    ready_.resize((fibers_.size() + 63) / 64);
    at_.resize(fibers_.size());
    for (Fiber& fiber : fibers_) at_[fiber.position] = &fiber, make_ready(fiber);
  }

  void run() {
    while (live_ > 0) {
      if (Fiber* next = first_ready())
        resume(*next);
      else if (!idle())
        fail("deadlock: threads wait for each other");
      if (!error_.empty()) throw std::runtime_error(error_);
    }
  }

  void sync_block() { arrive(self->block->waiting, self->block->live); }
  void sync_cluster() { arrive(waiting_, live_); }
  Block& block(unsigned rank) { return blocks_.at(rank); }

  // All lanes of `mask` put in a value; the last one computes everybody's result(warp, lane).
  template <class Result>
  uint64_t exchange(unsigned mask, uint64_t value, Result&& result) {
    Warp& warp = *self->warp;
    warp.value[self->lane] = value, warp.arrived |= 1u << self->lane;
    if ((warp.arrived & mask) == mask) {
      for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) warp.result[lane] = result(warp, lane);
      warp.arrived &= ~mask;
      for_lanes(mask, [&](Fiber& fiber) { make_ready(fiber); });
    }
    suspend();
    return warp.result[self->lane];
  }

  // The lanes that come here before all others wait elsewhere: one of the answers that hardware may give.
  unsigned active() {
    self->warp->converging |= 1u << self->lane;
    suspend();
    return static_cast<unsigned>(self->warp->result[self->lane]);
  }

  // A copy that lands at once, or as late as it can: never before somebody waits for it.
  void copy_later(std::function<void()> copy) {
    const bool late = settings.order == Order::reversed || (settings.order == Order::random && generator_() % 2);
    if (late)
      copies_.push_back(std::move(copy));
    else
      copy(), news_ = true;
  }

  void news() { news_ = true; }
  void wait_for_news() {
    sleeping_.push_back(self);
    suspend();
  }

  void fail(const std::string& what) {
    if (error_.empty()) error_ = what;
  }

 private:
  // Blocks, then warps, then lanes, in the settings' order: position of each thread.
  std::vector<unsigned> ordered(unsigned threads) {
    const unsigned n = static_cast<unsigned>(fibers_.size());
    std::vector<unsigned> list(n), place(n), key(n / 32 + n + 1);
    std::iota(list.begin(), list.end(), 0u);
    for (unsigned& k : key) k = static_cast<unsigned>(generator_());
    if (settings.order == Order::reversed) std::reverse(list.begin(), list.end());
    if (settings.order == Order::random) {
      auto by = [&](unsigned i) { return std::tuple(key[i / threads], key[n - i / 32], key[i]); };
      std::sort(list.begin(), list.end(), [&](unsigned a, unsigned b) { return by(a) < by(b); });
    }
    for (unsigned i = 0; i < n; ++i) place[list[i]] = i;
    return place;
  }

  void make_ready(Fiber& fiber) { ready_[fiber.position / 64] |= uint64_t{1} << fiber.position % 64; }

  Fiber* first_ready() {
    for (size_t word = 0; word < ready_.size(); ++word)
      if (ready_[word]) return at_[word * 64 + static_cast<size_t>(__builtin_ctzll(ready_[word]))];
    return nullptr;
  }

  // Nobody can run: a copy lands, or lanes that asked who is active hear that it is they.
  bool idle() {
    bool moved = false;
    if (!copies_.empty()) {
      copies_.back()();
      copies_.pop_back();
      news_ = true;
    }
    if (news_) {
      for (Fiber* fiber : sleeping_) make_ready(*fiber), moved = true;
      sleeping_.clear();
      news_ = false;
    }
    if (moved || !copies_.empty()) return true;
    for (Block& block : blocks_)
      for (Warp& warp : block.warps) {
        const unsigned mask = std::exchange(warp.converging, 0u);
        for_lanes(&warp, mask, [&](Fiber& fiber) { warp.result[fiber.lane] = mask, make_ready(fiber), moved = true; });
      }
    return moved;
  }

  template <class Action>
  void for_lanes(unsigned mask, Action&& action) {
    for_lanes(self->warp, mask, action);
  }
  template <class Action>
  void for_lanes(const Warp* warp, unsigned mask, Action&& action) {
    if (mask == 0) return;
    for (Block& block : blocks_) {
      if (warp < block.warps.data() || warp >= block.warps.data() + block.warps.size()) continue;
      const size_t first = static_cast<size_t>(warp - block.warps.data()) * 32;
      for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) action(fibers_[block.rank * shape.block.x + first + lane]);
    }
  }

  void arrive(std::vector<Fiber*>& waiting, int expected) {
    waiting.push_back(self);
    release_if_complete(waiting, expected);
    suspend();
  }

  void release_if_complete(std::vector<Fiber*>& waiting, int expected) {
    if (waiting.empty() || static_cast<int>(waiting.size()) < expected) return;
    for (Fiber* fiber : waiting) make_ready(*fiber);
    waiting.clear();
  }

  // No fortified longjmp: fibers jump between stacks. AddressSanitizer is told of each jump before and behind it.
  __attribute__((noinline)) void resume(Fiber& fiber) {
    self = &fiber;
    char* const bottom = stack(static_cast<size_t>(&fiber - fibers_.data()));
    ready_[fiber.position / 64] &= ~(uint64_t{1} << fiber.position % 64);
    if (_setjmp(scheduler_)) return arrived(fake_, nullptr, nullptr);
    leaving(&fake_, bottom, kStack);
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = bottom;
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, &Cluster::entry, 0);
    setcontext(&fiber.start);
  }

  __attribute__((noinline)) void suspend() {
    Fiber& fiber = *self;
    if (_setjmp(fiber.context) == 0) {
      leaving(&fiber.fake, bottom_, size_);
      _longjmp(scheduler_, 1);
    }
    self->cluster->arrived(self->fake, &bottom_, &size_);
  }

  // From the stack that is left: null where it ends. To the one that is next.
  static void leaving([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
  }
  // On the stack that was next, and which one was left.
  static void arrived([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom,
                      [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
  }

  static void entry() {
    Cluster& cluster = *self->cluster;
    arrived(nullptr, &cluster.bottom_, &cluster.size_);
    try {
      cluster.body_();
    } catch (const std::exception& error) {
      cluster.fail(error.what());
    }
    Block& block = *self->block;
    --cluster.live_;
    if (--block.live == 0)
      for (auto& [key, memory] : block.shared) std::memset(memory.begin, kPoison, memory.size);  // nobody's any more
    cluster.release_if_complete(block.waiting, block.live);
    cluster.release_if_complete(cluster.waiting_, cluster.live_);
    leaving(nullptr, cluster.bottom_, cluster.size_);
    _longjmp(cluster.scheduler_, 1);
  }

  const std::function<void()>& body_;
  std::mt19937 generator_;
  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> at_;  // by position
  std::vector<uint64_t> ready_;
  std::vector<Fiber*> waiting_, sleeping_;
  std::vector<std::function<void()>> copies_;
  bool news_ = false;
  int live_;
  std::string error_;
  jmp_buf scheduler_;
  void* fake_ = nullptr;          // of the scheduler's stack, which is
  const void* bottom_ = nullptr;  // here
  size_t size_ = 0;
};

// A variable of a block's shared memory; Key is a type of its own for each declaration and instantiation.
template <class T, class Key>
T& shared(Key) {
  static char key;
  return *reinterpret_cast<T*>(self->block->memory(&key, sizeof(T)));
}

inline const char dynamic_key = 0;

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(self->block->memory(&dynamic_key, shape.dynamic_bytes));
}

}  // namespace cuda_host
