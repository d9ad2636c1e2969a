// Matrix products on blocks that fit in cache: C[m][n] (+)= sum over k of A[m][k] * B[k][n].
//
// A and B are read in units of 32 bits, a float or a pair of bfloat16 along k. A may be strided both ways; B has its n
// side by side, N a multiple of 16. C is float.
#pragma once

#include "vector.h"

enum Mode { STORE, ADD, STREAM };

#ifdef __AVX512F__
static const int ROWS = 12, VECTORS = 2;
#else
static const int ROWS = 6, VECTORS = 1;
#endif
static const long DEPTH = 256;  // units along k whose slice of B stays in the first-level cache

struct View {
  const uint32_t* p;
  long row, col;  // strides in units
};

// Memory to bring into the second-level cache meanwhile: `rows` rows of a matrix, `row` units apart.
struct Fetch {
  const uint32_t* p;
  long row, rows;
};

template <class E, int MR, int NV, int MODE>
static inline __attribute__((always_inline)) void tile(
    long K, View a, const uint32_t* B, long ldb, float* C, long ldc, long ahead, Fetch fetch) {
  v16 acc[MR][NV];
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) acc[i][j] = v16{};
  // Every third row has a pointer of its own, and the two below it are reached from there: few registers.
  const uint32_t* rows[(MR + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (MR + 2) / 3; i++) rows[i] = a.p + 3 * i * a.row;
  long one = a.row, two = 2 * a.row;
  for (long k = 0; k < K; k++) {
    v16 b[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) b[j] = load(B + 16 * j);
    if (ahead) __builtin_prefetch(B + ahead), __builtin_prefetch(B + ahead + 16);
    if (k % 16 < fetch.rows) __builtin_prefetch(fetch.p + k % 16 * fetch.row + k / 16 * 16, 0, 2);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      uint32_t scalar = rows[i / 3][i % 3 == 0 ? 0 : i % 3 == 1 ? one : two];
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) acc[i][j] = E::fma(scalar, b[j], acc[i][j]);
    }
    B += ldb;
#pragma GCC unroll 4
    for (int i = 0; i < (MR + 2) / 3; i++) rows[i] += a.col;
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) {
      float* c = C + i * ldc + 16 * j;
      if (MODE == ADD) acc[i][j] += load(c);  // at the end: the rounding error of a long sum stays that of its slices
      MODE == STREAM ? stream(c, acc[i][j]) : store(c, acc[i][j]);
    }
}

template <class E, int NV, int MODE>
static void column(long M, long K, View a, const uint32_t* B, long ldb, float* C, long ldc, long ahead, Fetch fetch) {
  long m = 0;
#define TILE(MR) \
  for (; m + MR <= M; m += MR) tile<E, MR, NV, MODE>(K, View{a.p + m * a.row, a.row, a.col}, B, ldb, C + m * ldc, ldc, ahead, \
                          Fetch{fetch.p ? fetch.p + m * fetch.row : nullptr, fetch.row, fetch.rows})
  TILE(ROWS);
#ifdef __AVX512F__
  TILE(8);
#endif
  TILE(4);
  TILE(2);
  TILE(1);
#undef TILE
}

template <class E, int MODE>
static void slice(long M, long N, long K, View a, const uint32_t* B, long ldb, float* C, long ldc, long ahead, Fetch fetch) {
  long n = 0;
  for (; n + 16 * VECTORS <= N; n += 16 * VECTORS) column<E, VECTORS, MODE>(M, K, a, B + n, ldb, C + n, ldc, ahead, fetch);
  for (; n < N; n += 16) column<E, 1, MODE>(M, K, a, B + n, ldb, C + n, ldc, ahead, fetch);
}

template <class E>
static void vector_gemm(
    long M, long N, long K, View a, const uint32_t* B, long ldb, float* C, long ldc, Mode mode, long depth = DEPTH, long ahead = 0, Fetch fetch = {}) {
  if (K <= depth && mode == STREAM) return slice<E, STREAM>(M, N, K, a, B, ldb, C, ldc, ahead, fetch);
  for (long k = 0; k < K; k += depth) {
    long deep = K - k < depth ? K - k : depth;
    View part = {a.p + k * a.col, a.row, a.col};
    if (k || mode == ADD)
      slice<E, ADD>(M, N, deep, part, B + k * ldb, ldb, C, ldc, ahead, fetch);
    else
      slice<E, STORE>(M, N, deep, part, B + k * ldb, ldb, C, ldc, ahead, fetch);
  }
}

// C[o][m] for at most 4 rows m, both operands with k side by side, M a multiple of 4, K of 16: one pass over A.
template <class E, int MR>
static void dot_rows(long M, long K, const uint32_t* A, long lda, const uint32_t* const* rows, float* C, long ldc) {
  for (long o = 0; o < M; o += 4) {
    v16 acc[4][MR] = {};
    for (long k = 0; k < K; k += 16) {
      v16 b[MR];
#pragma GCC unroll 4
      for (int j = 0; j < MR; j++) b[j] = load(rows[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        v16 w = load(A + (o + i) * lda + k);
        __builtin_prefetch(A + (o + i) * lda + k + 256);
#pragma GCC unroll 4
        for (int j = 0; j < MR; j++) {
          if (E::PAIR == 1) {
            acc[i][j] += w * b[j];
          } else {
#ifdef __AVX512BF16__
            acc[i][j] = (v16)_mm512_dpbf16_ps((__m512)acc[i][j], (__m512bh)w, (__m512bh)b[j]);
#else
            acc[i][j] += (v16)((u16v)w << 16) * (v16)((u16v)b[j] << 16) +
                         (v16)((u16v)w & 0xffff0000u) * (v16)((u16v)b[j] & 0xffff0000u);
#endif
          }
        }
      }
    }
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < MR; j++) C[(o + i) * ldc + j] = sum(acc[i][j]);
  }
}

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

struct __attribute__((packed)) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

static inline void tiles_on() {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}
static inline void tiles_off() { _tile_release(); }

// Whether the system lets this process use the tiles.
static bool tiles_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Up to 2 x 2 tiles of 16 x 16: tiles 0..3 hold C, 4 and 5 A, 6 and 7 B.
template <int MT, int NT, bool ADDS>
static void tile_block(long K, const uint32_t* A, long lda, const uint32_t* B, long ldb, float* C, long ldc, Fetch fetch) {
  if (ADDS) {
    _tile_loadd(0, C, ldc * 4);
    if (NT > 1) _tile_loadd(1, C + 16, ldc * 4);
    if (MT > 1) _tile_loadd(2, C + 16 * ldc, ldc * 4);
    if (MT > 1 && NT > 1) _tile_loadd(3, C + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < K; k += 16) {
    _tile_loadd(4, A + k, lda * 4);
    if (MT > 1) _tile_loadd(5, A + 16 * lda + k, lda * 4);
    if (fetch.p)
      for (int i = 0; i < fetch.rows; i++) __builtin_prefetch(fetch.p + i * fetch.row + k, 0, 2);
    _tile_loadd(6, B + k * ldb, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (MT > 1) _tile_dpbf16ps(2, 5, 6);
    if (NT > 1) {
      _tile_loadd(7, B + k * ldb + 16, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
      if (MT > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, C, ldc * 4);
  if (NT > 1) _tile_stored(1, C + 16, ldc * 4);
  if (MT > 1) _tile_stored(2, C + 16 * ldc, ldc * 4);
  if (MT > 1 && NT > 1) _tile_stored(3, C + 16 * ldc + 16, ldc * 4);
}

// M and N multiples of 16, K of 16 pairs, A with k side by side.
template <bool ADDS>
static void tile_slice(
    long M, long N, long K, const uint32_t* A, long lda, const uint32_t* B, long ldb, float* C, long ldc, Fetch fetch) {
  for (long n = 0; n < N; n += 32)
    for (long m = 0; m < M; m += 32) {
      const uint32_t *a = A + m * lda, *b = B + n;
      float* c = C + m * ldc + n;
      if (m + 32 <= M && n + 32 <= N) tile_block<2, 2, ADDS>(K, a, lda, b, ldb, c, ldc, fetch);
      else if (m + 32 <= M) tile_block<2, 1, ADDS>(K, a, lda, b, ldb, c, ldc, fetch);
      else if (n + 32 <= N) tile_block<1, 2, ADDS>(K, a, lda, b, ldb, c, ldc, fetch);
      else tile_block<1, 1, ADDS>(K, a, lda, b, ldb, c, ldc, fetch);
    }
}

static void tile_gemm(
    long M, long N, long K, const uint32_t* A, long lda, const uint32_t* B, long ldb, float* C, long ldc, Mode mode, Fetch fetch = {}) {
  for (long k = 0; k < K; k += DEPTH) {
    long deep = K - k < DEPTH ? K - k : DEPTH;
    if (k || mode == ADD) tile_slice<true>(M, N, deep, A + k, lda, B + k * ldb, ldb, C, ldc, fetch);
    else tile_slice<false>(M, N, deep, A + k, lda, B + k * ldb, ldb, C, ldc, fetch);
  }
}
#else
#define HAVE_AMX 0
static inline void tiles_on() {}
static inline void tiles_off() {}
static bool tiles_allowed() { return false; }
#endif
