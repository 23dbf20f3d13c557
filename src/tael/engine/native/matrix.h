// Matrices in the formats they are stored in, and their products with rows of activations.
//
// Every element of a product is summed in one fixed order (along the input, in eight lanes, or by groups of 32), so a
// row's result has the same bits whatever rows it is computed with.
//
// Packed formats hold panels of 8 outputs; a panel is one stream of groups of 32 inputs:
//   int4         128 bytes of codes: vector v of 32 bytes, byte 4c + j: input 8v + j of output c in the low nibble,
//                input 8v + 4 + j in the high; then 8 fp16 scales, then 8 fp16 minimums where there are some
//   w8a8         256 bytes: vector v, byte 4c + j: input 4v + j of output c; 8 fp16 scales
//   int8         256 bytes: input k of output c at 8k + c; 8 fp16 scales
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vector.h"

namespace tael {

constexpr int64_t kGroup = 32;
constexpr int64_t kPanel = 8;

enum class Kind : int { f32, f16, bf16, int8, w8a8, int4 };

struct Matrix {
  Kind kind = Kind::f32;
  int64_t out = 0, in = 0;
  const void* data = nullptr;
  const float* bias = nullptr;
  bool minimums = false;

  bool packed() const { return kind >= Kind::int8; }
  bool rounds_activations() const { return kind >= Kind::w8a8; }
  int64_t groups() const { return in / kGroup; }
  int64_t units() const { return (out + kPanel - 1) / kPanel; }
  int64_t group_bytes() const { return kind == Kind::int4 ? 128 + (minimums ? 32 : 16) : 256 + 16; }
  int64_t unit_bytes() const {
    if (packed()) return groups() * group_bytes();
    return kPanel * in * (kind == Kind::f32 ? 4 : 2);
  }
  const uint8_t* panel(int64_t unit) const { return static_cast<const uint8_t*>(data) + unit * unit_bytes(); }
};

// Rows of activations: fp32, and rounded to int8 by groups of 32 where a matrix wants that.
struct Rows {
  const float* x = nullptr;
  int64_t count = 0, width = 0;
  bool rounded = false;
  std::vector<int8_t> codes;   // [count, width]
  std::vector<float> scales;   // [count, groups]: amax / 127
  std::vector<int32_t> start;  // [count, groups]: two int16, -8 times the sum of the codes at k % 4 in {0,1} and {2,3}
  std::vector<float> sums;     // [count, groups]: scale times the sum of the codes

  void set(const float* data, int64_t rows, int64_t columns, bool round) {
    x = data, count = rows, width = columns, rounded = round;
    if (!round) return;
    const int64_t groups = width / kGroup;
    codes.resize(count * width);
    scales.resize(count * groups), start.resize(count * groups), sums.resize(count * groups);
  }

  void round_row(int64_t row) {
    const int64_t groups = width / kGroup;
    const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = x + row * width + g * kGroup;
      __m256 v[4], top = _mm256_setzero_ps();
      for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_loadu_ps(from + 8 * i);
        top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[i]));
      }
      const float amax = max8(top);
      const __m256 inverse = _mm256_set1_ps(amax > 1e-30f ? 127.0f / amax : 0.0f);
      __m256i q[4];
      for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
      const __m256i bytes = _mm256_permutevar8x32_epi32(
          _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes.data() + row * width + g * kGroup), bytes);
      const __m256i pairs = _mm256_maddubs_epi16(ones8, bytes);  // 16 sums of two neighbours
      __m128i s = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0x4e));
      s = _mm_add_epi16(s, _mm_shuffle_epi32(s, 0xb1));
      const __m128i minus8 = _mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(s, 3));
      const int64_t at = row * groups + g;
      scales[at] = amax / 127.0f;
      start[at] = _mm_cvtsi128_si32(minus8);
      sums[at] = scales[at] * static_cast<float>(_mm_cvtsi128_si32(_mm_madd_epi16(s, _mm256_castsi256_si128(ones16))));
    }
  }
};

namespace kernels {

template <int R>
struct Pointers {
  const float* x[R];
  const int8_t* codes[R];
  const float* scales[R];
  const int32_t* start[R];
  const float* sums[R];
};

inline __m256i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// Keeps the compiler from moving sums away from their products: gcc 12 else holds all products of a group and spills them
// (measured: 71 against 92 billion multiply-adds a second and core for four rows).
inline void in_order(__m256i& sum) { asm("" : "+x"(sum)); }

constexpr int64_t kAhead = 2048;  // bytes: doubles what one core draws from memory (10 to 18 GB/s measured)

inline void fetch_ahead(const uint8_t* w) { _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0); }

// R rows by P panels, `apart` bytes from one panel to the next.
// Unsigned codes 0..15 times int8: |sum of a group's 8 products a lane| <= 30480 fits int16 even before -8 is taken in.
template <int R, int P, bool Minimums>
inline void int4_panels(const uint8_t* w, int64_t apart, int64_t groups, const Pointers<R>& p, __m256 (&result)[P][R]) {
  const __m256i low4 = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 acc[P][R];
  for (int c = 0; c < P; ++c)
    for (int r = 0; r < R; ++r) acc[c][r] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m256i sum[P][R];
    for (int r = 0; r < R; ++r) {
      const __m256i start = Minimums ? _mm256_setzero_si256() : _mm256_set1_epi32(p.start[r][g]);
      for (int c = 0; c < P; ++c) sum[c][r] = start;
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __m256i low[P], high[P];
      for (int c = 0; c < P; ++c) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + c * apart + 32 * v));
        if (v % 2 == 0) fetch_ahead(w + c * apart + 32 * v);
        low[c] = _mm256_and_si256(both, low4), high[c] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low4);
      }
      for (int r = 0; r < R; ++r) {
        const int8_t* a = p.codes[r] + g * kGroup + 8 * v;
        __m256i x = broadcast4(a);
        for (int c = 0; c < P; ++c) {
          sum[c][r] = _mm256_add_epi16(sum[c][r], _mm256_maddubs_epi16(low[c], x));
          in_order(sum[c][r]);
        }
        x = broadcast4(a + 4);
        for (int c = 0; c < P; ++c) {
          sum[c][r] = _mm256_add_epi16(sum[c][r], _mm256_maddubs_epi16(high[c], x));
          in_order(sum[c][r]);
        }
      }
    }
    for (int c = 0; c < P; ++c) {
      const auto* factors = reinterpret_cast<const uint16_t*>(w + c * apart + 128);
      const __m256 scale = load8_half(factors);
      for (int r = 0; r < R; ++r) {
        const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[c][r], ones));
        acc[c][r] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale, _mm256_set1_ps(p.scales[r][g])), acc[c][r]);
      }
      if constexpr (Minimums) {
        const __m256 minimum = load8_half(factors + 8);
        for (int r = 0; r < R; ++r)
          acc[c][r] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(p.sums[r][g]), acc[c][r]);
      }
    }
    w += Minimums ? 160 : 144;
  }
  for (int c = 0; c < P; ++c)
    for (int r = 0; r < R; ++r) result[c][r] = acc[c][r];
}

// int8 times int8: the first factor of the instruction is unsigned, so the sign of the weight goes to the activation.
template <int R, int P>
inline void w8a8_panels(const uint8_t* w, int64_t apart, int64_t groups, const Pointers<R>& p, __m256 (&result)[P][R]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 acc[P][R];
  for (int c = 0; c < P; ++c)
    for (int r = 0; r < R; ++r) acc[c][r] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m256i sum[P][R];
    for (int c = 0; c < P; ++c)
      for (int r = 0; r < R; ++r) sum[c][r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      for (int c = 0; c < P; ++c) {
        const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + c * apart + 32 * v));
        if (v % 2 == 0) fetch_ahead(w + c * apart + 32 * v);
        const __m256i size = _mm256_abs_epi8(code);
        for (int r = 0; r < R; ++r) {
          const __m256i a = _mm256_sign_epi8(broadcast4(p.codes[r] + g * kGroup + 4 * v), code);
          sum[c][r] = _mm256_add_epi32(sum[c][r], _mm256_madd_epi16(_mm256_maddubs_epi16(size, a), ones));
          in_order(sum[c][r]);
        }
      }
    }
    for (int c = 0; c < P; ++c) {
      const __m256 scale = load8_half(reinterpret_cast<const uint16_t*>(w + c * apart + 256));
      for (int r = 0; r < R; ++r)
        acc[c][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c][r]), _mm256_mul_ps(scale, _mm256_set1_ps(p.scales[r][g])),
                                    acc[c][r]);
    }
    w += 272;
  }
  for (int c = 0; c < P; ++c)
    for (int r = 0; r < R; ++r) result[c][r] = acc[c][r];
}

// Weights alone rounded: they are made floats and multiplied as such.
template <int R, int P>
inline void int8_panels(const uint8_t* w, int64_t apart, int64_t groups, const Pointers<R>& p, __m256 (&result)[P][R]) {
  __m256 acc[P][R];
  for (int c = 0; c < P; ++c)
    for (int r = 0; r < R; ++r) acc[c][r] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m256 sum[P][R];
    for (int c = 0; c < P; ++c)
      for (int r = 0; r < R; ++r) sum[c][r] = _mm256_setzero_ps();
    for (int64_t k = 0; k < kGroup; ++k) {
      if (k % 8 == 0)
        for (int c = 0; c < P; ++c) fetch_ahead(w + c * apart + 8 * k);
      for (int c = 0; c < P; ++c) {
        const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + c * apart + 8 * k));
        const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
        for (int r = 0; r < R; ++r)
          sum[c][r] = _mm256_fmadd_ps(code, _mm256_broadcast_ss(p.x[r] + g * kGroup + k), sum[c][r]);
      }
    }
    for (int c = 0; c < P; ++c) {
      const __m256 scale = load8_half(reinterpret_cast<const uint16_t*>(w + c * apart + 256));
      for (int r = 0; r < R; ++r) acc[c][r] = _mm256_fmadd_ps(sum[c][r], scale, acc[c][r]);
    }
    w += 272;
  }
  for (int c = 0; c < P; ++c)
    for (int r = 0; r < R; ++r) result[c][r] = acc[c][r];
}

// Four outputs of a row-major matrix for R rows: each a dot product in eight lanes.
template <Type T, int R>
inline void float_quad(const void* const* w, int64_t in, const Pointers<R>& p, __m128* out) {
  __m256 acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm256_setzero_ps();
  for (int64_t k = 0; k < in; k += 8) {
    __m256 x[R];
    for (int r = 0; r < R; ++r) x[r] = _mm256_loadu_ps(p.x[r] + k);
    for (int c = 0; c < 4; ++c) {
      const __m256 weight = load8<T>(w[c], k);
      for (int r = 0; r < R; ++r) acc[r][c] = _mm256_fmadd_ps(weight, x[r], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) out[r] = sum8x4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

// P units from `index` on, for R rows.
template <int R, int P>
inline void units(const Matrix& m, int64_t index, const Pointers<R>& p, float* const* y) {
  alignas(32) float result[P][R][kPanel];
  if (m.packed()) {
    __m256 acc[P][R];
    const uint8_t* w = m.panel(index);
    const int64_t apart = m.unit_bytes();
    if (m.kind == Kind::int4) {
      if (m.minimums)
        int4_panels<R, P, true>(w, apart, m.groups(), p, acc);
      else
        int4_panels<R, P, false>(w, apart, m.groups(), p, acc);
    } else if (m.kind == Kind::w8a8) {
      w8a8_panels<R, P>(w, apart, m.groups(), p, acc);
    } else {
      int8_panels<R, P>(w, apart, m.groups(), p, acc);
    }
    for (int c = 0; c < P; ++c)
      for (int r = 0; r < R; ++r) _mm256_store_ps(result[c][r], acc[c][r]);
  } else {
    const int64_t row_bytes = m.in * (m.kind == Kind::f32 ? 4 : 2);
    for (int quad = 0; quad < 2 * P; ++quad) {
      const void* w[4];
      for (int c = 0; c < 4; ++c) {
        const int64_t o = std::min(index * kPanel + 4 * quad + c, m.out - 1);
        w[c] = static_cast<const uint8_t*>(m.data) + o * row_bytes;
      }
      __m128 out[R];
      if (m.kind == Kind::f32)
        float_quad<Type::f32, R>(w, m.in, p, out);
      else if (m.kind == Kind::f16)
        float_quad<Type::f16, R>(w, m.in, p, out);
      else
        float_quad<Type::bf16, R>(w, m.in, p, out);
      for (int r = 0; r < R; ++r) _mm_store_ps(result[quad / 2][r] + 4 * (quad % 2), out[r]);
    }
  }
  for (int c = 0; c < P; ++c) {
    const int64_t first = (index + c) * kPanel, columns = std::min(kPanel, m.out - first);
    for (int r = 0; r < R; ++r) {
      if (m.bias)
        for (int64_t i = 0; i < columns; ++i) result[c][r][i] += m.bias[first + i];
      std::memcpy(y[r] + first, result[c][r], columns * sizeof(float));
    }
  }
}

template <int R, int P>
inline void block(const Matrix& m, const Rows& x, const int32_t* index, int64_t row, int64_t from, int64_t to, float* y,
                  int64_t stride) {
  Pointers<R> p;
  float* out[R];
  const int64_t groups = x.width / kGroup;
  for (int r = 0; r < R; ++r) {
    const int64_t at = index ? index[row + r] : row + r;
    p.x[r] = x.x + at * x.width;
    p.codes[r] = x.codes.data() + at * x.width;
    p.scales[r] = x.scales.data() + at * groups;
    p.start[r] = x.start.data() + at * groups;
    p.sums[r] = x.sums.data() + at * groups;
    out[r] = y + (row + r) * stride;
  }
  int64_t u = from;
  for (; u + P <= to; u += P) units<R, P>(m, u, p, out);
  if constexpr (P > 1)
    for (; u < to; ++u) units<R, 1>(m, u, p, out);
}

}  // namespace kernels

// y[i, outputs of units from..to) = matrix x[index[i]] (x[i] without an index) for rows i in first..last.
inline void multiply(const Matrix& m, const Rows& x, const int32_t* index, int64_t first, int64_t last, int64_t from,
                     int64_t to, float* y, int64_t stride) {
  switch (last - first) {
    case 0: return;
    case 1: return kernels::block<1, 1>(m, x, index, first, from, to, y, stride);
    case 2: return kernels::block<2, 1>(m, x, index, first, from, to, y, stride);
    case 3: return kernels::block<3, 1>(m, x, index, first, from, to, y, stride);
    case 4: return kernels::block<4, 1>(m, x, index, first, from, to, y, stride);
    default: break;
  }
  // Many rows: two panels stay in the first cache while the rows pass.
  for (int64_t u = from; u < to; u += 2) {
    const int64_t end = std::min(u + 2, to);
    int64_t row = first;
    if (m.packed())
      for (; row + 4 <= last; row += 4) kernels::block<4, 2>(m, x, index, row, u, end, y, stride);
    else
      for (; row + 3 <= last; row += 3) kernels::block<3, 1>(m, x, index, row, u, end, y, stride);
    multiply(m, x, index, row, last, u, end, y, stride);
  }
}

// One output's weights as floats (an embedding's row); `to` holds `in` values.
inline void read_row(const Matrix& m, int64_t o, float* to) {
  if (!m.packed()) {
    const Type type = static_cast<Type>(static_cast<int>(m.kind));
    return to_float(type, static_cast<const uint8_t*>(m.data) + o * m.in * bytes_of(type), to, m.in);
  }
  const uint8_t* w = m.panel(o / kPanel);
  const int64_t c = o % kPanel;
  for (int64_t g = 0; g < m.groups(); ++g, w += m.group_bytes()) {
    const int64_t codes = m.kind == Kind::int4 ? 128 : 256;
    const auto* scales = reinterpret_cast<const uint16_t*>(w + codes);
    const float scale = half_to_float(scales[c]);
    const float base = m.kind != Kind::int4 ? 0.0f : m.minimums ? half_to_float(scales[8 + c]) : -8.0f * scale;
    for (int64_t k = 0; k < kGroup; ++k) {
      float code;
      if (m.kind == Kind::int4)
        code = static_cast<float>(w[(k / 8) * 32 + 4 * c + k % 4] >> (k % 8 < 4 ? 0 : 4) & 15);
      else
        code = static_cast<float>(
            static_cast<int8_t>(m.kind == Kind::w8a8 ? w[(k / 4) * 32 + 4 * c + k % 4] : w[8 * k + c]));
      to[g * kGroup + k] = scale * code + base;
    }
  }
}

// From rows of codes to panels. codes: int4 [out, in / 2] (even columns in the low nibble), else int8 [out, in];
// scales, minimums fp16 [out, in / group], group a multiple of 32. Outputs beyond `out` get scale 0.
inline void pack(const Matrix& m, const uint8_t* codes, const uint16_t* scales, const uint16_t* minimums,
                 int64_t group, int64_t unit, uint8_t* to) {
  std::memset(to, 0, m.unit_bytes());
  const int64_t scale_columns = m.in / group;
  const bool four = m.kind == Kind::int4;
  for (int64_t c = 0; c < std::min(kPanel, m.out - unit * kPanel); ++c) {
    const int64_t o = unit * kPanel + c;
    uint8_t* w = to;
    for (int64_t g = 0; g < m.groups(); ++g, w += m.group_bytes()) {
      for (int64_t k = 0; k < kGroup; ++k) {
        const int64_t i = g * kGroup + k;
        if (four) {
          const uint8_t nibble = codes[o * (m.in / 2) + i / 2] >> (i % 2 ? 4 : 0) & 15;
          w[(k / 8) * 32 + 4 * c + k % 4] |= static_cast<uint8_t>(k % 8 < 4 ? nibble : nibble << 4);
        } else {
          w[m.kind == Kind::w8a8 ? (k / 4) * 32 + 4 * c + k % 4 : 8 * k + c] = codes[o * m.in + i];
        }
      }
      auto* factors = reinterpret_cast<uint16_t*>(w + (four ? 128 : 256));
      factors[c] = scales[o * scale_columns + g * kGroup / group];
      if (m.minimums) factors[8 + c] = minimums[o * scale_columns + g * kGroup / group];
    }
  }
}

}  // namespace tael
