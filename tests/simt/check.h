// What the programs in this directory need to test without a framework.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/ops.h"
#include "simt.h"

namespace check {

inline int passed = 0, failed = 0;

inline void that(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

// Every order that the shim knows, with a few seeds of the random one; the last `count` of them.
template <typename F>
void for_each_schedule(F&& f, int count = 5) {
  const struct {
    int kind;
    uint64_t seed;
  } schedules[] = {{kSimtInOrder, 0}, {kSimtReverse, 0}, {kSimtRandom, 1}, {kSimtRandom, 2}, {kSimtRandom, 3}};
  for (int i = 5 - count; i < 5; ++i) {
    simt_set_schedule(schedules[i].kind, schedules[i].seed);
    f();
  }
  simt_set_schedule(kSimtInOrder, 0);
}

// Runs `f`, which returns its outputs as bytes, under `count` schedules and checks that they agree bit by bit.
template <typename F>
void same_bits_under_every_schedule(const std::string& what, F&& f, int count = 5) {
  std::vector<std::vector<char>> results;
  for_each_schedule([&] { results.push_back(f()); }, count);
  bool same = true;
  for (const auto& result : results) same = same && result == results[0];
  that(same, what + ": same bits under every schedule");
}

template <typename T>
void append_bytes(std::vector<char>& bytes, const std::vector<T>& values) {
  const char* data = reinterpret_cast<const char*>(values.data());
  bytes.insert(bytes.end(), data, data + sizeof(T) * values.size());
}

// Calls one op of the table with a workspace and a staging area of exactly the size it asks for, filled with garbage.
template <typename Op>
std::string call(kfac_fast::WorkspaceSize (*size_of)(const Op&, const kfac_fast::Context&),
                 const char* (*run)(const Op&, const kfac_fast::Context&), const Op& op) {
  kfac_fast::Context ctx;
  const kfac_fast::WorkspaceSize size = size_of(op, ctx);
  std::vector<char> workspace(size.device_bytes + 256, '\xff');
  std::vector<char> staging(size.staging_bytes + 256, '\xff');
  const auto align = [](std::vector<char>& v) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(v.data()) + 255) / 256 * 256);
  };
  ctx.workspace = align(workspace);
  ctx.staging = align(staging);
  const char* error = run(op, ctx);
  // The slack behind the areas shows what was written beyond them.
  const auto untouched = [&](const std::vector<char>& v, const void* begin, size_t bytes) {
    const size_t used = static_cast<const char*>(begin) - v.data() + bytes;
    return std::all_of(v.begin() + used, v.end(), [](char c) { return c == '\xff'; });
  };
  if (!untouched(workspace, ctx.workspace, size.device_bytes)) return "wrote beyond the workspace";
  if (!untouched(staging, ctx.staging, size.staging_bytes)) return "wrote beyond the staging area";
  return error == nullptr ? "" : error;
}

inline std::mt19937_64& generator() {
  static std::mt19937_64 g(20240607);
  return g;
}

inline double normal() {
  static std::normal_distribution<double> d;
  return d(generator());
}

}  // namespace check

void test_shim();
void test_damped_inverse();
void test_factor_update();
void test_shifted_images();
void test_commit();
void test_precondition();
