// Vectors of float, as wide as the instruction set that this file is compiled for: AVX-512 or AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

struct Float16 { uint16_t bits; };

#if defined(__AVX512F__)

using Floats = __m512;
constexpr int WIDTH = 16;

static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Floats load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
static inline void store(Float16* p, Floats a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
static inline Floats fill(float a) { return _mm512_set1_ps(a); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
static inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
// 1 / a within a unit in the last place, for a in [1, 1e38]: half of what a division takes
static inline Floats reciprocal(Floats a) {
  Floats guess = _mm512_rcp14_ps(a);
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(guess, a, _mm512_set1_ps(2.0f)));
}
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// where one of the two is NaN, both give the second
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
static inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
static inline Floats round_to_whole(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Floats times_power_of_two(Floats a, Floats whole) { return _mm512_scalef_ps(a, whole); }
static inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
static inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
// the first `count` lanes, zeros in the others
static inline Floats keep_first(Floats a, int count) { return _mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), a); }
using Integers = __m512i;
static inline Integers no_integers() { return _mm512_setzero_si512(); }
static inline Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
static inline int sum(Integers a) { return _mm512_reduce_add_epi32(a); }
// whole numbers as high * 8 + low, with low in [-4, 3]
static inline void split(Floats whole, Integers* high, Integers* low) {
  Integers numbers = _mm512_cvtps_epi32(whole);
  *high = _mm512_srai_epi32(_mm512_add_epi32(numbers, _mm512_set1_epi32(4)), 3);
  *low = _mm512_sub_epi32(numbers, _mm512_slli_epi32(*high, 3));
}
static inline void store_bytes(int8_t* p, Integers a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }

#else

using Floats = __m256;
constexpr int WIDTH = 8;

static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline Floats load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
static inline void store(Float16* p, Floats a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
static inline Floats fill(float a) { return _mm256_set1_ps(a); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
static inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats reciprocal(Floats a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
static inline Floats magnitude(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline Floats round_to_whole(Floats a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Floats times_power_of_two(Floats a, Floats whole) {
  __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
static inline float sum(Floats a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline float largest(Floats a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
static inline Floats keep_first(Floats a, int count) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}
using Integers = __m256i;
static inline Integers no_integers() { return _mm256_setzero_si256(); }
static inline Integers add(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
static inline int sum(Integers a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
static inline void split(Floats whole, Integers* high, Integers* low) {
  Integers numbers = _mm256_cvtps_epi32(whole);
  *high = _mm256_srai_epi32(_mm256_add_epi32(numbers, _mm256_set1_epi32(4)), 3);
  *low = _mm256_sub_epi32(numbers, _mm256_slli_epi32(*high, 3));
}
static inline void store_bytes(int8_t* p, Integers a) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

#endif

// e to the power of x, within 2 units in the last place for x in [-87, 88]; clamped beyond, NaN stays NaN
static inline Floats exponential(Floats x) {
  x = smaller(fill(88.0f), larger(fill(-87.0f), x));
  Floats whole = round_to_whole(multiply(x, fill(1.44269504f)));
  Floats rest = multiply_add(whole, fill(-0.693359375f), x);
  rest = multiply_add(whole, fill(2.12194440e-4f), rest);
  Floats power = fill(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    power = multiply_add(power, rest, fill(coefficient));
  power = multiply_add(multiply(power, rest), rest, add(rest, fill(1.0f)));
  return times_power_of_two(power, whole);
}
