// Vectors of 16 floats, bfloat16, and a 16 x 16 transpose. Everything compiles without AVX-512 too, only slower.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef float v16_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u16_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t bf16;

static inline v16 load(const void* p) { return *(const v16_any*)p; }
static inline void store(void* p, v16 v) { *(v16_any*)p = v; }
static inline u16v load_u(const void* p) { return *(const u16_any*)p; }
static inline void store_u(void* p, u16v v) { *(u16_any*)p = v; }
static inline v16 splat(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
static inline float low(uint32_t pair) { uint32_t b = pair << 16; float f; memcpy(&f, &b, 4); return f; }
static inline float widen(bf16 h) { return low(h); }

// Past the cache; `p` is a multiple of 64 bytes.
static inline void stream(float* p, v16 v) {
#ifdef __AVX512F__
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}

static inline float sum(v16 v) {
  float total = 0;
  for (int i = 0; i < 16; i++) total += v[i];
  return total;
}

// Round to nearest, ties to even; a NaN stays one. The bfloat16 stands in the low half of each lane.
static inline u16v round_bf16(v16 v) {
  u16v bits = (u16v)v;
  u16v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  i16 nan = v != v;
  return (rounded & ~(u16v)nan) | (((bits >> 16) | 0x40) & (u16v)nan);
}

static inline v16 load_bf16(const bf16* p) {
#ifdef __AVX512F__
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  v16 v;
  for (int i = 0; i < 16; i++) v[i] = widen(p[i]);
  return v;
#endif
}

static inline void store_bf16(bf16* p, v16 v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  u16v bits = round_bf16(v);
  for (int i = 0; i < 16; i++) p[i] = (bf16)bits[i];
#endif
}

// 32 floats as 32 bfloat16, past the cache where `past`; `p` is then a multiple of 64 bytes.
static inline void store_bf16_line(bf16* p, v16 a, v16 b, bool past) {
#ifdef __AVX512BF16__
  __m512i line = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  past ? _mm512_stream_si512((__m512i*)p, line) : _mm512_storeu_si512(p, line);
#else
  (void)past;
  store_bf16(p, a), store_bf16(p + 16, b);
#endif
}

// Two rows as pairs: lane i holds low[i] in its low half and high[i] in its high half.
static inline u16v pair_rows(v16 low, v16 high) { return round_bf16(low) | (round_bf16(high) << 16); }

// The element types: how 16 of them are read and written, how many make up the 32-bit unit of a product, its multiply-add.
struct F32 {
  typedef float T;
  static const int PAIR = 1;
  static v16 read(const T* p) { return load(p); }
  static void write(T* p, v16 v) { store(p, v); }
  static float one(T x) { return x; }
  static v16 fma(uint32_t a, v16 b, v16 acc) { float f; memcpy(&f, &a, 4); return acc + splat(f) * b; }
};

struct BF16 {
  typedef bf16 T;
  static const int PAIR = 2;
  static v16 read(const T* p) { return load_bf16(p); }
  static void write(T* p, v16 v) { store_bf16(p, v); }
  static float one(T x) { return widen(x); }
  static v16 fma(uint32_t a, v16 b, v16 acc) {
#ifdef __AVX512BF16__
    return (v16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    v16 b_low = (v16)((u16v)b << 16), b_high = (v16)((u16v)b & 0xffff0000u);
    return acc + splat(low(a)) * b_low + splat(low(a >> 16)) * b_high;
#endif
  }
};

static inline void transpose(v16 r[16]) {
#ifdef __AVX512F__
#pragma GCC unroll 4
  for (int s = 1; s < 16; s *= 2) {
    i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i16 odd = (lane & s) != 0;
    i16 first = (odd & (lane - s + 16)) | (~odd & lane), second = (odd & (lane + 16)) | (~odd & (lane + s));
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      if (!(i & s)) {
        __m512 a = (__m512)r[i], b = (__m512)r[i + s];
        r[i] = (v16)_mm512_permutex2var_ps(a, (__m512i)first, b);
        r[i + s] = (v16)_mm512_permutex2var_ps(a, (__m512i)second, b);
      }
  }
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < i; j++) {
      float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
#endif
}
