// Attention of rows of queries to keys in a paged cache. A row's numbers depend on its own keys alone: keys are taken in
// chunks at fixed places, each chunk gives (maximum, sum, weighted values), and chunks are merged in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector.h"

namespace tael {

constexpr int64_t kChunk = 64;
constexpr int64_t kMostRows = 64;  // queries that look at one chunk together
constexpr int64_t kTile = 16;

// What one chunk, or several merged ones, gave a row.
struct Partial {
  float top = -std::numeric_limits<float>::infinity();
  float sum = 0;
};

struct AttentionScratch {
  std::vector<float> scores, tile;
  std::vector<float> values, sums;  // [kMostRows, dv]: one chunk's, and all of them so far
};

// acc [width] and `part` take in another chunk's.
inline void merge(Partial& part, float* acc, const Partial& other, const float* values, int64_t width) {
  if (other.sum == 0) return;
  if (part.sum == 0) {
    part = other;
    std::memcpy(acc, values, width * sizeof(float));
    return;
  }
  const float top = std::max(part.top, other.top);
  const float mine = std::exp(part.top - top), theirs = std::exp(other.top - top);
  const __m256 a = _mm256_set1_ps(mine), b = _mm256_set1_ps(theirs);
  for (int64_t i = 0; i < width; i += 8)
    _mm256_storeu_ps(acc + i, _mm256_fmadd_ps(_mm256_loadu_ps(values + i), b, _mm256_mul_ps(_mm256_loadu_ps(acc + i), a)));
  part.sum = part.sum * mine + other.sum * theirs;
  part.top = top;
}

// Dot products of R queries with 4 keys.
template <int R>
inline void dots(const float* const* q, const float* const* k, int64_t width, __m128* out) {
  __m256 acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm256_setzero_ps();
  for (int64_t i = 0; i < width; i += 8) {
    __m256 x[R];
    for (int r = 0; r < R; ++r) x[r] = _mm256_loadu_ps(q[r] + i);
    for (int c = 0; c < 4; ++c) {
      const __m256 key = _mm256_loadu_ps(k[c] + i);
      for (int r = 0; r < R; ++r) acc[r][c] = _mm256_fmadd_ps(key, x[r], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) out[r] = sum8x4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

// acc[r] += sum over t of p[r][t] values[t], for R rows and C * 8 columns.
template <int R, int C>
inline void weigh(const float* const* p, const float* const* v, int64_t keys, int64_t at, float* const* acc) {
  __m256 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = _mm256_loadu_ps(acc[r] + at + 8 * c);
  for (int64_t t = 0; t < keys; ++t) {
    __m256 weight[R];
    for (int r = 0; r < R; ++r) weight[r] = _mm256_broadcast_ss(p[r] + t);
    for (int c = 0; c < C; ++c) {
      const __m256 value = _mm256_loadu_ps(v[t] + at + 8 * c);
      for (int r = 0; r < R; ++r) sum[r][c] = _mm256_fmadd_ps(weight[r], value, sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(acc[r] + at + 8 * c, sum[r][c]);
}

template <int R>
inline void weigh_row(const float* const* p, const float* const* v, int64_t keys, int64_t width, float* const* acc) {
  int64_t at = 0;
  for (; at + 32 <= width; at += 32) weigh<R, 4>(p, v, keys, at, acc);
  for (; at + 8 <= width; at += 8) weigh<R, 1>(p, v, keys, at, acc);
}

// One chunk for `rows` queries: keys first..last, of which row r sees those below limit[r].
// key(i, buffer) and value(i, buffer) return the fp32 values of slot first + i, in `buffer` where they had to be converted.
// ahead(i) asks for that slot's memory before it is needed: a sequence's entries lie too far apart for the processor to
// foresee, and have left the caches since the last token.
// parts[r] and values[r] [dv] are set.
template <class Key, class Value, class Ahead>
void attend_chunk(int64_t rows, const float* const* q, const int64_t* limit, int64_t first, int64_t last, int64_t dk,
                  int64_t dv, float scale, const Key& key, const Value& value, const Ahead& ahead, Partial* parts,
                  float* const* values, AttentionScratch& scratch) {
  const int64_t keys = last - first, stride = kChunk + 8;
  scratch.scores.resize(rows * stride);
  scratch.tile.resize(kTile * std::max(dk, dv));
  const float* tile[kTile];
  for (int64_t i = 0; i < std::min(kTile, keys); ++i) ahead(i);
  for (int64_t t = 0; t < keys; t += kTile) {
    const int64_t some = std::min(kTile, keys - t);
    for (int64_t i = t + kTile; i < std::min(t + 2 * kTile, keys); ++i) ahead(i);
    for (int64_t i = 0; i < kTile; ++i)
      tile[i] = i < some ? key(t + i, scratch.tile.data() + i * dk) : tile[some - 1];
    for (int64_t i = 0; i < some; i += 4) {
      int64_t r = 0;
      __m128 out[3];
      for (; r + 3 <= rows; r += 3) {
        dots<3>(q + r, tile + i, dk, out);
        for (int j = 0; j < 3; ++j) _mm_storeu_ps(scratch.scores.data() + (r + j) * stride + t + i, out[j]);
      }
      for (; r < rows; ++r) {
        dots<1>(q + r, tile + i, dk, out);
        _mm_storeu_ps(scratch.scores.data() + r * stride + t + i, out[0]);
      }
    }
  }
  const __m256 factor = _mm256_set1_ps(scale), never = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t r = 0; r < rows; ++r) {
    float* s = scratch.scores.data() + r * stride;
    const int64_t seen = std::clamp<int64_t>(limit[r] - first, 0, keys);
    std::memset(values[r], 0, dv * sizeof(float));
    parts[r] = Partial{};
    const int64_t padded = (seen + 7) / 8 * 8;
    for (int64_t t = seen; t < std::max(padded, keys); ++t) s[t] = -std::numeric_limits<float>::infinity();
    __m256 top = never;
    for (int64_t t = 0; t < padded; t += 8) {
      const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(s + t), factor);
      _mm256_storeu_ps(s + t, x);
      top = _mm256_max_ps(top, x);
    }
    if (seen > 0) parts[r].top = max8(top);
    const __m256 shift = _mm256_set1_ps(seen > 0 ? parts[r].top : 0.0f);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t t = 0; t < padded; t += 8) {
      const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + t), shift));
      _mm256_storeu_ps(s + t, e);
      sum = _mm256_add_ps(sum, e);
    }
    for (int64_t t = padded; t < keys; ++t) s[t] = 0;
    parts[r].sum = seen > 0 ? sum8(sum) : 0.0f;
  }
  for (int64_t t = 0; t < keys; t += kTile) {
    const int64_t some = std::min(kTile, keys - t);
    for (int64_t i = 0; i < some; ++i) tile[i] = value(t + i, scratch.tile.data() + i * dv);
    int64_t r = 0;
    const float* p[3];
    for (; r < rows; r += 3) {
      const int64_t these = std::min<int64_t>(3, rows - r);
      for (int64_t j = 0; j < these; ++j) p[j] = scratch.scores.data() + (r + j) * stride + t;
      if (these == 3)
        weigh_row<3>(p, tile, some, dv, values + r);
      else if (these == 2)
        weigh_row<2>(p, tile, some, dv, values + r);
      else
        weigh_row<1>(p, tile, some, dv, values + r);
    }
  }
}

}  // namespace tael
