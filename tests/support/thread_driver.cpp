// Every CPU kernel, called by three threads at once, each with a team of 1 to 4: for ThreadSanitizer
// (tests/sanitize.py). What is read is shared, what is written is each caller's own.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/pool.h"
#include "../../csrc/cpu/sparse.h"

namespace {

using namespace fastdistil;

constexpr int64_t kRows = 97, kColumns = 2011, kTop = 6, kHeads = 4, kLength = 61, kWidth = 16;

struct Shared {
  std::vector<float> student, teacher, queries, keys, ones;
  std::vector<int64_t> labels;
  std::vector<int32_t> columns, index;
  std::vector<double> values, rest;

  Shared() : ones(200000, 1.0f), labels(kRows), columns(kRows * kTop), values(kRows * kTop), rest(kRows) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t n) {
      x.resize(static_cast<size_t>(n));
      for (float& value : x) value = normal(generator);
    };
    fill(student, kRows * kColumns), fill(teacher, kRows * kColumns);
    fill(queries, 2 * kHeads * kLength * kWidth), fill(keys, 2 * kHeads * kLength * kWidth);
    for (int64_t r = 0; r < kRows; ++r) {
      labels[r] = generator() % kColumns, rest[r] = std::log(0.4);
      for (int64_t i = 0; i < kTop; ++i)
        columns[r * kTop + i] = static_cast<int32_t>(i * 300 + r), values[r * kTop + i] = std::log(0.1);
    }
    for (int32_t i = 0; i < 150000; i += 3) index.push_back(i);
  }
};

int calls(const Shared& shared, int seed) {
  int done = 0;
  std::vector<float> loss(kRows), stats(kRows * kStats), gradient(kRows * kColumns), rows(2 * kHeads * kLength);
  std::vector<float> dq(shared.queries.size()), dk(dq.size()), param = shared.student, exp_avg(shared.index.size()),
                                                               exp_avg_sq(exp_avg.size()), taken(exp_avg.size());
  std::vector<double> top(kRows * (kTopkStats + kTop));
  for (int threads = 1; threads <= 4; ++threads) {
    omp_set_num_threads(1 + (seed + threads) % 4);
    for (int divergence = 0; divergence < kDivergenceCount; ++divergence) {
      LogitArgs args{};
      args.student = shared.student.data(), args.teacher = shared.teacher.data(), args.row_scale = shared.ones.data();
      args.loss = loss.data(), args.stats = stats.data(), args.gradient = gradient.data();
      args.rows = kRows, args.columns = kColumns, args.divergence = divergence, args.beta = 0.3;
      args.student_stride = args.teacher_stride = args.gradient_stride = kColumns;
      args.student_temperature = args.teacher_temperature = args.value_factor = 1;
      cpu::logit(args, {shared.labels.data(), shared.ones.data()}, threads), ++done;
      args.loss = nullptr, args.dloss = shared.ones.data();
      cpu::logit(args, {}, threads), ++done;
    }
    for (const auto tail : {Tail::bucket, Tail::renormalize, Tail::zero}) {
      TopkArgs args{};
      args.student = shared.student.data(), args.values = shared.values.data(), args.named = shared.columns.data();
      args.rest = shared.rest.data(), args.row_scale = shared.ones.data(), args.loss = loss.data();
      args.stats = top.data(), args.gradient = gradient.data(), args.rows = kRows, args.columns = kColumns;
      args.k = kTop, args.student_stride = args.gradient_stride = kColumns, args.tail = tail;
      args.temperature = args.value_factor = 1;
      cpu::topk(args, threads), ++done;
    }
    for (const auto kind : {HiddenKind::mse, HiddenKind::cosine}) {
      HiddenArgs args{};
      args.student = shared.student.data(), args.teacher = shared.teacher.data(), args.row_scale = shared.ones.data();
      args.loss = loss.data(), args.gradient = gradient.data(), args.rows = kRows, args.columns = kColumns;
      args.student_stride = args.teacher_stride = kColumns, args.kind = kind;
      cpu::hidden(args, threads), ++done;
    }
    CrossEntropyArgs labelled{};
    labelled.logits = shared.student.data(), labelled.labels = shared.labels.data();
    labelled.row_scale = shared.ones.data(), labelled.loss = loss.data(), labelled.gradient = gradient.data();
    labelled.rows = kRows, labelled.columns = kColumns, labelled.logits_stride = labelled.gradient_stride = kColumns;
    cpu::cross_entropy(labelled, threads), ++done;
    RowMomentsArgs moments{};
    moments.student = shared.student.data(), moments.teacher = shared.teacher.data();
    moments.row_scale = shared.ones.data(), moments.moments = stats.data(), moments.rows = kRows;
    moments.columns = kColumns, moments.student_stride = moments.teacher_stride = kColumns;
    moments.student_temperature = moments.teacher_temperature = 1;
    cpu::row_moments(moments, threads), ++done;
    AcceptanceArgs acceptance{};
    acceptance.student = shared.student.data(), acceptance.teacher = shared.teacher.data();
    acceptance.row_scale = shared.ones.data(), acceptance.levels = shared.ones.data();
    acceptance.log_acceptance = loss.data(), acceptance.rows = kRows, acceptance.columns = kColumns;
    acceptance.student_stride = acceptance.teacher_stride = kColumns;
    acceptance.student_temperature = acceptance.teacher_temperature = 1;
    cpu::acceptance(acceptance, threads), ++done;
    for (int kind = 0; kind < kAttentionKindCount; ++kind) {
      AttentionArgs args{};
      const HeadsArgs own{shared.queries.data(), kHeads, kWidth, kHeads * kLength * kWidth, kLength * kWidth, kWidth};
      HeadsArgs other = own;
      other.data = shared.keys.data();
      args.student_q = args.teacher_k = own, args.student_k = args.teacher_q = other;
      args.row_scale = shared.ones.data(), args.rows = rows.data(), args.dq = dq.data(), args.dk = dk.data();
      args.batch = 2, args.length = kLength, args.kind = static_cast<AttentionKind>(kind);
      args.student_scale = args.teacher_scale = 0.25;
      cpu::attention(args, threads), ++done;
      if (args.kind == AttentionKind::score_mse) cpu::attention_low_rank(args, threads), ++done;
    }
    const ChangeArgs change{param.data(), shared.teacher.data(), kRows * kColumns, DType::f32, DType::f32};
    std::vector<int64_t> counts(kHighBuckets);
    cpu::sparse_histogram(change, counts.data(), kAllBuckets, threads), ++done;
    std::vector<int32_t> kept(static_cast<size_t>(change.size));
    cpu::sparse_compact({change, 0x3f800000, 10, kept.data(), change.size, false}, threads), ++done;
    const auto entries = static_cast<int64_t>(shared.index.size());
    cpu::MoveArgs move{};
    move.tensor = param.data(), move.size = change.size, move.index = shared.index.data(), move.values = taken.data();
    move.entries = entries, move.itemsize = 4;
    cpu::sparse_take(move, threads), cpu::sparse_put(move, threads), done += 2;
    int64_t table[kUpdateColumns] = {};
    table[kParam] = reinterpret_cast<int64_t>(param.data());
    table[kGradient] = reinterpret_cast<int64_t>(shared.teacher.data());
    table[kIndex] = reinterpret_cast<int64_t>(shared.index.data());
    table[kExpAvg] = reinterpret_cast<int64_t>(exp_avg.data());
    table[kExpAvgSq] = reinterpret_cast<int64_t>(exp_avg_sq.data());
    table[kEntries] = entries, table[kSize] = change.size;
    const double constants[kUpdateConstants] = {1, 0.1, 0.9, 0.1, 1e-8, 0.1, 1, 0};
    cpu::sparse_update(table, constants, 1, threads), ++done;
    cpu::PooledMemory block(size_t{1} << 20);
    std::memset(block.data(), seed, block.size()), ++done;
    if (threads % 2) cpu::pool_release();
  }
  return done;
}

}  // namespace

int main() {
  const Shared shared;
  int done[3] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back([&shared, &done, i] { done[i] = calls(shared, i); });
  for (std::thread& caller : callers) caller.join();
  std::printf("%d calls\n", done[0] + done[1] + done[2]);
  return 0;
}
