// What a plain read of memory reaches: the yardstick for how fast weights are read.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include <sys/mman.h>

#include "pool.h"

namespace tael {

// Bytes a second over `bytes` (far more than caches hold) by `threads` threads, each reading its own stretch from front
// to back in 32-byte loads, as products read weights. The median of five passes.
inline double read_bandwidth(int threads, int64_t bytes) {
  constexpr int64_t page = 1 << 21;
  const int64_t each = std::max<int64_t>(page, bytes / threads / page * page), total = each * threads;
  std::unique_ptr<uint8_t, decltype(&std::free)> memory(static_cast<uint8_t*>(std::aligned_alloc(page, total)), &std::free);
  if (!memory) throw std::bad_alloc();
  madvise(memory.get(), total, MADV_HUGEPAGE);
  Pool pool(threads);
  std::vector<int64_t> sums(threads * 8);
  auto fill = [&](int64_t task, int) { std::fill_n(memory.get() + task * each, each, uint8_t(task + 1)); };
  auto read = [&](int64_t task, int) {
    const auto* at = reinterpret_cast<const __m256i*>(memory.get() + task * each);
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (int64_t i = 0; i < each / 32; i += 4) {
      _mm_prefetch(reinterpret_cast<const char*>(at + i + 32), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at + i + 34), _MM_HINT_T0);
      a = _mm256_xor_si256(a, _mm256_load_si256(at + i)), b = _mm256_xor_si256(b, _mm256_load_si256(at + i + 1));
      c = _mm256_xor_si256(c, _mm256_load_si256(at + i + 2)), d = _mm256_xor_si256(d, _mm256_load_si256(at + i + 3));
    }
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    sums[task * 8] += _mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 3);
  };
  pool.begin();
  pool.run(threads, fill);
  std::vector<double> found;
  for (int pass = 0; pass < 5; ++pass) {
    const auto began = std::chrono::steady_clock::now();
    pool.run(threads, read);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    found.push_back(double(total) / took.count());
  }
  pool.end();
  static volatile int64_t seen;  // the reads must not be found useless
  seen = sums[0];
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

}  // namespace tael
