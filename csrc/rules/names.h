// An enum and the names of its entries from one list, LIST(X) = X(first) X(second) ...; Python's lists are compared
// with these (fastdistil/contracts, tests/test_house.py).
#pragma once

#define FD_ENTRY(name) name,
#define FD_NAME(name) #name,
#define FD_COUNT(name) +1

// clang-format off
#define FD_NAMED_ENUM(Enum, LIST)                           \
  enum class Enum : int { LIST(FD_ENTRY) };                 \
  constexpr const char* k##Enum##Names[] = {LIST(FD_NAME)}; \
  constexpr int k##Enum##Count = 0 LIST(FD_COUNT);
// clang-format on
