// Eight fp32 lanes (AVX2, FMA, F16C): loads from stored types, sums in one fixed order, exp, RMSNorm, SwiGLU, RoPE.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tael {

enum class Type : int { f32, f16, bf16 };

inline int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

template <Type T>
inline __m256 load8(const void* base, int64_t i) {
  if constexpr (T == Type::f32) {
    return _mm256_loadu_ps(static_cast<const float*>(base) + i);
  } else {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + i));
    if constexpr (T == Type::f16) return _mm256_cvtph_ps(raw);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
}

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

inline __m256 load8_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// n must be a multiple of 8 in the copies below.
inline void to_float(Type type, const void* from, float* to, int64_t n) {
  if (type == Type::f32) {
    std::memcpy(to, from, n * 4);
  } else if (type == Type::f16) {
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(to + i, load8<Type::f16>(from, i));
  } else {
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(to + i, load8<Type::bf16>(from, i));
  }
}

inline void from_float(Type type, const float* from, void* to, int64_t n) {
  if (type == Type::f32) {
    std::memcpy(to, from, n * 4);
    return;
  }
  auto* out = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 x = _mm256_loadu_ps(from + i);
    __m128i packed;
    if (type == Type::f16) {
      packed = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    } else {  // round to nearest even by hand
      const __m256i bits = _mm256_castps_si256(x);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i high = _mm256_srli_epi32(up, 16);
      packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), packed);
  }
}

inline float sum8(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}

// The sums of four vectors, each in sum8's order.
inline __m128 sum8x4(__m256 a, __m256 b, __m256 c, __m256 d) {
  auto half = [](__m256 x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); };
  __m128 r0 = half(a), r1 = half(b), r2 = half(c), r3 = half(d);
  // sum8 adds lanes (0 + 2) and (1 + 3), then the two.
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  return _mm_add_ps(_mm_add_ps(r0, r2), _mm_add_ps(r1, r3));
}

inline float max8(__m256 x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  s = _mm_max_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
}

// exp, within 2 units in the last place; 0 below -87.3. Range reduction to [-ln2/2, ln2/2] and a polynomial of
// degree 6 (minimax coefficients as in the Cephes library's expf).
inline __m256 exp8(__m256 x) {
  const __m256 low = _mm256_set1_ps(-87.33654f);
  const __m256 under = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
  x = _mm256_min_ps(_mm256_max_ps(x, low), _mm256_set1_ps(88.37626f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
  __m256 y = _mm256_set1_ps(1.9875691500e-4f);
  y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.3981999507e-3f));
  y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(8.3334519073e-3f));
  y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(4.1665795894e-2f));
  y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.6666665459e-1f));
  y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(5.0000001201e-1f));
  y = _mm256_fmadd_ps(y, _mm256_mul_ps(x, x), _mm256_add_ps(x, _mm256_set1_ps(1.0f)));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(under, _mm256_mul_ps(y, _mm256_castsi256_ps(power)));
}

// x / sqrt(mean(x^2) + eps) * weight; n a multiple of 8.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  __m256 s = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    s = _mm256_fmadd_ps(v, v, s);
  }
  const __m256 scale = _mm256_set1_ps(1.0f / std::sqrt(sum8(s) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale), _mm256_loadu_ps(weight + i)));
}

// gate <- silu(gate) * up; n a multiple of 8.
inline void swiglu(float* gate, const float* up, int64_t n) {
  const __m256 one = _mm256_set1_ps(1.0f);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 g = _mm256_loadu_ps(gate + i);
    const __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), g));
    _mm256_storeu_ps(gate + i, _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, e)), _mm256_loadu_ps(up + i)));
  }
}

inline void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 8)
    _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
}

inline void add_scaled(float* x, const float* y, float scale, int64_t n) {
  const __m256 s = _mm256_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 8)
    _mm256_storeu_ps(x + i, _mm256_fmadd_ps(s, _mm256_loadu_ps(y + i), _mm256_loadu_ps(x + i)));
}

// Rotate pairs (0,1), (2,3).. when interleaved, else (i, i + pairs), in place. cos, sin [pairs].
inline void rotate(float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved) {
  int64_t i = 0;
  if (interleaved) {
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    auto spread = [&](const float* p) { return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), twice); };
    for (; i + 4 <= pairs; i += 4) {
      const __m256 v = _mm256_loadu_ps(x + 2 * i), swapped = _mm256_permute_ps(v, 0xb1);
      _mm256_storeu_ps(
          x + 2 * i, _mm256_addsub_ps(_mm256_mul_ps(v, spread(cos + i)), _mm256_mul_ps(swapped, spread(sin + i))));
    }
  } else {
    for (; i + 8 <= pairs; i += 8) {
      const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + pairs);
      const __m256 c = _mm256_loadu_ps(cos + i), s = _mm256_loadu_ps(sin + i);
      _mm256_storeu_ps(x + i, _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s)));
      _mm256_storeu_ps(x + i + pairs, _mm256_add_ps(_mm256_mul_ps(b, c), _mm256_mul_ps(a, s)));
    }
  }
  for (; i < pairs; ++i) {
    float* first = interleaved ? x + 2 * i : x + i;
    float* second = interleaved ? first + 1 : x + i + pairs;
    const float a = *first, b = *second;
    *first = a * cos[i] - b * sin[i];
    *second = b * cos[i] + a * sin[i];
  }
}

}  // namespace tael
