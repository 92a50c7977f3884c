// A vector of floats in the instruction set this file is compiled for, with loads and stores that
// convert from and to the activation's type. Everything is in a namespace of its own per
// instruction set, so that the linker can't mix them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fusedres::cpu::FUSEDRES_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Which lanes of a vector are in play: all, or the first n at the end of an axis.
struct All {};
struct First {
  int n;
};
// One value in all lanes.
struct One {};

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

inline Vec set(float a) { return {_mm512_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // NaN stays
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

// value where not (u <= threshold), else 0: a NaN in u keeps value
inline Vec keep_above(Vec u, Vec threshold, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(u.v, threshold.v, _CMP_NLE_UQ), value.v)};
}
// value where a == b, else 0
inline Vec keep_equal(Vec a, Vec b, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), value.v)};
}
// Where v > most or v is a NaN, most becomes v and place becomes here.
inline void take_larger(Vec v, Vec here, Vec& most, Vec& place) {
  const __m512 bound = _mm512_min_ps(most.v, _mm512_set1_ps(INFINITY));  // for a NaN the second
  const __mmask16 taken = _mm512_cmp_ps_mask(v.v, bound, _CMP_NLE_UQ);
  most.v = _mm512_mask_mov_ps(most.v, taken, v.v);
  place.v = _mm512_mask_mov_ps(place.v, taken, here.v);
}

inline __mmask16 mask_of(First lanes) { return static_cast<__mmask16>((1u << lanes.n) - 1); }
inline Vec zero_beyond(Vec a, All) { return a; }
inline Vec zero_beyond(Vec a, First lanes) { return {_mm512_maskz_mov_ps(mask_of(lanes), a.v)}; }

inline __m512 widen(__m256i bits, const BFloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 widen(__m256i bits, const Half*) { return _mm512_cvtph_ps(bits); }

inline __m256i narrow(__m512 v, const BFloat16*) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline __m256i narrow(__m512 v, const Half*) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec load(const float* p, All = {}) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, First lanes) { return {_mm512_maskz_loadu_ps(mask_of(lanes), p)}; }
inline void store(float* p, Vec a, All = {}) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, First lanes) { _mm512_mask_storeu_ps(p, mask_of(lanes), a.v); }

inline Vec load(const uint8_t* p, All = {}) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
inline Vec load(const uint8_t* p, First lanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(mask_of(lanes), p);
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
inline void store(uint8_t* p, Vec a, All = {}) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a.v)));
}
inline void store(uint8_t* p, Vec a, First lanes) {
  _mm512_mask_cvtepi32_storeu_epi8(p, mask_of(lanes), _mm512_cvttps_epi32(a.v));
}

template <class T>
inline Vec load(const T* p, All = {}) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p)};
}
template <class T>
inline Vec load(const T* p, First lanes) {
  return {widen(_mm256_maskz_loadu_epi16(mask_of(lanes), p), p)};
}
template <class T>
inline void store(T* p, Vec a, All = {}) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a.v, p));
}
template <class T>
inline void store(T* p, Vec a, First lanes) {
  _mm256_mask_storeu_epi16(p, mask_of(lanes), narrow(a.v, p));
}

#else

#if defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

inline Vec set(float a) { return {_mm256_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }  // NaN stays
inline Vec keep_above(Vec u, Vec threshold, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(u.v, threshold.v, _CMP_NLE_UQ), value.v)};
}
inline Vec keep_equal(Vec a, Vec b, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ), value.v)};
}
inline void take_larger(Vec v, Vec here, Vec& most, Vec& place) {
  const __m256 bound = _mm256_min_ps(most.v, _mm256_set1_ps(INFINITY));
  const __m256 taken = _mm256_cmp_ps(v.v, bound, _CMP_NLE_UQ);
  most.v = _mm256_blendv_ps(most.v, v.v, taken);
  place.v = _mm256_blendv_ps(place.v, here.v, taken);
}

inline Vec load(const float* p, All = {}) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p, All = {}) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Half* p, All = {}) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load(const uint8_t* p, All = {}) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
}
inline void store(float* p, Vec a, All = {}) { _mm256_storeu_ps(p, a.v); }
inline void store(uint8_t* p, Vec a, All = {}) {
  const __m256i wide = _mm256_cvttps_epi32(a.v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline void store(BFloat16* p, Vec a, All = {}) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Half* p, Vec a, All = {}) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else  // any other processor: loops that its compiler turns into its own vectors

struct Vec {
  static constexpr int width = 8;
  float v[width];
};

template <class F>
inline Vec lanewise(F f) {
  Vec r;
  for (int i = 0; i < Vec::width; ++i) r.v[i] = f(i);
  return r;
}
inline Vec set(float a) {
  return lanewise([&](int) { return a; });
}
inline Vec operator+(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return lanewise([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return lanewise([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Vec relu(Vec a) {
  return lanewise([&](int i) { return a.v[i] < 0.0f ? 0.0f : a.v[i]; });
}
inline Vec keep_above(Vec u, Vec threshold, Vec value) {
  return lanewise([&](int i) { return u.v[i] <= threshold.v[i] ? 0.0f : value.v[i]; });
}
inline Vec keep_equal(Vec a, Vec b, Vec value) {
  return lanewise([&](int i) { return a.v[i] == b.v[i] ? value.v[i] : 0.0f; });
}
inline void take_larger(Vec v, Vec here, Vec& most, Vec& place) {
  const Vec bound = lanewise([&](int i) { return most.v[i] <= INFINITY ? most.v[i] : INFINITY; });
  place = lanewise([&](int i) { return v.v[i] <= bound.v[i] ? place.v[i] : here.v[i]; });
  most = lanewise([&](int i) { return v.v[i] <= bound.v[i] ? most.v[i] : v.v[i]; });
}

inline float widen(float v) { return v; }
inline float widen(uint8_t v) { return v; }
inline float widen(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float widen(Half v) {
  _Float16 h;
  std::memcpy(&h, &v, sizeof h);
  return static_cast<float>(h);
}
inline void narrow(float v, float* p) { *p = v; }
inline void narrow(float v, uint8_t* p) { *p = static_cast<uint8_t>(v); }
inline void narrow(float v, BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = v != v ? 0x7fc0 : static_cast<uint16_t>(rounded);
}
inline void narrow(float v, Half* p) {
  const _Float16 h = static_cast<_Float16>(v);
  std::memcpy(p, &h, sizeof h);
}

template <class T>
inline Vec load(const T* p, All = {}) {
  return lanewise([&](int i) { return widen(p[i]); });
}
template <class T>
inline void store(T* p, Vec a, All = {}) {
  for (int i = 0; i < Vec::width; ++i) narrow(a.v[i], p + i);
}

#endif

// Without masked instructions the end of an axis goes through a small buffer.
template <class T>
inline Vec load(const T* p, First lanes) {
  T buffer[Vec::width] = {};
  std::memcpy(buffer, p, lanes.n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store(T* p, Vec a, First lanes) {
  T buffer[Vec::width];
  store(buffer, a);
  std::memcpy(p, buffer, lanes.n * sizeof(T));
}
inline Vec zero_beyond(Vec a, All) { return a; }
inline Vec zero_beyond(Vec a, First lanes) {
  float buffer[Vec::width] = {};
  store(buffer, a, lanes);
  return load(buffer);
}
inline float sum(Vec a) {
  float buffer[Vec::width];
  store(buffer, a);
  float total = 0;
  for (float f : buffer) total += f;
  return total;
}

#endif

inline Vec load(const float* p, One) { return set(*p); }

// Values that alternate in memory: even[k] = p[2k], odd[k] = p[2k + 1], the first n of them.
struct Pair {
  Vec even, odd;
};
template <class T>
inline Pair load_pairs(const T* p, int n) {
  const int rest = n > Vec::width ? n - Vec::width : 0;
  float both[2 * Vec::width], even[Vec::width], odd[Vec::width];
  store(both, load(p, First{n - rest}));
  store(both + Vec::width, load(p + (n - rest), First{rest}));
  for (int k = 0; k < Vec::width; ++k) {
    even[k] = both[2 * k];
    odd[k] = both[2 * k + 1];
  }
  return {load(even), load(odd)};
}
template <class T>
inline void store_pairs(T* p, Pair pair, int n) {
  const int rest = n > Vec::width ? n - Vec::width : 0;
  float both[2 * Vec::width], even[Vec::width], odd[Vec::width];
  store(even, pair.even);
  store(odd, pair.odd);
  for (int k = 0; k < Vec::width; ++k) {
    both[2 * k] = even[k];
    both[2 * k + 1] = odd[k];
  }
  store(p, load(both), First{n - rest});
  store(p + (n - rest), load(both + Vec::width), First{rest});
}

// Calls f(offset, lanes) for each vector of an axis of n values.
template <class F>
inline void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vec::width <= n; i += Vec::width) f(i, All{});
  if (i < n) f(i, First{static_cast<int>(n - i)});
}

// The largest float that rounds to 0 or below in T: the ReLU looks at the value as stored.
template <class T>
struct Stored;
template <>
struct Stored<float> {
  static constexpr float zero = 0.0f;
};
template <>
struct Stored<BFloat16> {
  static constexpr float zero = 0x1p-134f;
};
template <>
struct Stored<Half> {
  static constexpr float zero = 0x1p-25f;
};

}  // namespace fusedres::cpu::FUSEDRES_ISA
