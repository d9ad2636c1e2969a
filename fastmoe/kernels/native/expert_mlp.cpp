// The routed MLP on a CPU, forward and backward, in float32 and bfloat16.
//
// Every weight is read once in forward and once in backward and its gradient written once; what happens between two
// products of a block of rows happens while it is in cache. Work is split into blocks of an expert's outputs, so that
// threads stay busy with one expert as with hundreds. Rows of one expert stand side by side ("sorted positions").
//
//   forward   rows to panels; pre = w1 x, hidden = act(pre); rows = weight * (w2 hidden + b2); y = sum of rows
//   backward  rows gathered; dhidden = grad w2, then act', dw1, dw2; dx rows = dpre w1; dx = sum of rows
#include <omp.h>
#include <stdlib.h>

#include "activation.h"
#include "gemm.h"

extern "C" struct Problem {
  int64_t T, D, H, E, N;
  int64_t bfloat16, gated, activation, threads, amx;
  const void* x;              // (T, D)
  const int64_t* token_ids;   // (N), in the router's order, as weights
  const float* weights;
  const int64_t* order;       // (N)
  const int32_t* ends;        // (E)
  const void *w1, *b1, *w2, *b2;
  void* pre;                  // (N, H), gated (N, 2H): of each expert, [column / 16][row][16]
  void* y;                    // (T, D)
  const void* grad;           // (T, D)
  void* dx;
  float* dweights;            // (N), in the router's order
  void *dw1, *db1, *dw2, *db2;
  char* scratch;
};

static const long PANEL = 32;    // rows side by side in forward
static const long CHUNK = 256;   // rows of one task
static const long OUTPUTS = 96;  // outputs of one task in forward
static const long SLAB = 128;    // columns of one task in backward

static inline long up(long n, long to) { return (n + to - 1) / to * to; }
// Neighbouring tasks go to one thread, which fetches the next one's weights ahead; and there are runs enough to share.
static inline long run_length(const Problem& p, long tasks) { return 1 + tasks / (p.threads * 8); }
static inline long least(long a, long b) { return a < b ? a : b; }

struct Group {
  long expert, first, rows, padded;  // `first`: sorted position; `padded`: where its padded rows start
  long begin, total;                 // sorted position and number of all rows of its expert
};

// Hands out pieces of one buffer; with no buffer it only adds up their sizes.
struct Arena {
  char* base;
  size_t used;
  template <class T>
  T* take(size_t count) {
    T* p = (T*)(base + used);
    used += (count * sizeof(T) + 4095) / 4096 * 4096 + 256;
    return p;
  }
};

// Groups of at most `most` rows of one expert, each padded to a multiple of `pad`; returns their number.
static long make_groups(const Problem& p, long most, long pad, Group* groups, long* padded_rows, bool empty) {
  long n = 0, padded = 0, start = 0;
  for (long e = 0; e < p.E; e++) {
    long end = p.ends[e], begin = start, total = end - start;
    if (start == end && empty) {
      if (groups) groups[n] = Group{e, start, 0, padded, begin, total};
      n++;
    }
    for (; start < end; start += most) {
      long rows = least(most, end - start);
      if (groups) groups[n] = Group{e, start, rows, padded, begin, total};
      n++, padded += up(rows, pad);
      if (rows < most) { start = end; break; }
    }
    start = end;
  }
  *padded_rows = padded;
  return n;
}

// Which sorted positions belong to each token: `positions[starts[t] .. starts[t + 1]]`.
static void index_tokens(const Problem& p, int32_t* starts, int32_t* positions, int32_t* next) {
  long R = p.E ? p.ends[p.E - 1] : 0;
  memset(starts, 0, (p.T + 1) * sizeof(int32_t));
  for (long i = 0; i < R; i++) starts[p.token_ids[p.order[i]] + 1]++;
  for (long t = 0; t < p.T; t++) starts[t + 1] += starts[t];
  memcpy(next, starts, p.T * sizeof(int32_t));
  for (long i = 0; i < R; i++) positions[next[p.token_ids[p.order[i]]]++] = (int32_t)i;
}

// Nobody waits at its end: nothing that follows in a parallel region reads `out` or writes to `rows`.
template <class E>
static void sum_rows(const Problem& p, const float* rows, const int32_t* starts, const int32_t* positions, void* out) {
  typedef typename E::T T;
#pragma omp for schedule(static) nowait
  for (long t = 0; t < p.T; t++)
    for (long d = 0; d < p.D; d += 16) {
      v16 total = {};
      for (long i = starts[t]; i < starts[t + 1]; i++) total += load(rows + positions[i] * p.D + d);
      E::write((T*)out + t * p.D + d, total);
    }
}

template <class E>
static inline v16 splat_bias(const void* bias, long i) {
  return bias ? splat(E::one(((const typename E::T*)bias)[i])) : v16{};
}

// C[o][m] of one group: outputs o of `w`, (outputs, K units), and its rows, in panels or, up to 4, side by side.
template <class E>
static void outputs_of(
    const Problem& p, const Group& g, const uint32_t* w, long outputs, long K, const uint32_t* panels, const uint32_t* const* few,
    float* C, long ldc) {
  if (few) {
    if (g.rows == 1) return dot_rows<E, 1>(outputs, K, w, K, few, C, ldc);
    if (g.rows == 2) return dot_rows<E, 2>(outputs, K, w, K, few, C, ldc);
    if (g.rows == 3) return dot_rows<E, 3>(outputs, K, w, K, few, C, ldc);
    return dot_rows<E, 4>(outputs, K, w, K, few, C, ldc);
  }
  long padded = up(g.rows, 16);
  uint32_t copy[OUTPUTS * (DEPTH + 16)];  // rows of w a power of two apart would share few lines of the first-level cache
  long count = (padded + PANEL - 1) / PANEL;
  const bool tiled = HAVE_AMX && E::PAIR == 2 && p.amx;
  const long step = tiled ? 32 : ROWS;
  for (long k = 0; k < K; k += DEPTH) {
    long deep = least(DEPTH, K - k);
    const uint32_t* next = k + deep < K ? w + k + deep : w + outputs * K;  // the slice, or the block, that comes then
    View part = {w + k, K, 1};
    if (count > 2) {
      for (long o = 0; o < outputs; o++) memcpy(copy + o * (DEPTH + 16), w + o * K + k, deep * 4);
      part = View{copy, DEPTH + 16, 1};
    }
    // Few panels: all of them with the rows of w just read, while the next ones are on their way. Many: w stands in cache.
    bool few_panels = count <= 2;
    long of_rows = (outputs + step - 1) / step;
    for (long t = 0; t < count * of_rows; t++) {
      long i = few_panels ? t % count : t / of_rows, o = (few_panels ? t / count : t % of_rows) * step;
      long m = i * PANEL, width = least(PANEL, padded - m), rows = least(step, outputs - o), share = up(step, count) / count;
      const uint32_t* soon = few_panels && o + step < outputs ? w + k + (o + step) * K : few_panels ? next : next + o * K;
      Fetch fetch = {soon + i * share * K, K, share};
      if (!few_panels) fetch = o / step % count == i ? Fetch{soon, K, step} : Fetch{};
      const uint32_t *A = part.p + o * part.row, *B = panels + m * K + k * width;
      float* c = C + o * ldc + m;
#if HAVE_AMX
      if (tiled) {
        tile_gemm(rows, width, deep, A, part.row, B, width, c, ldc, k ? ADD : STORE, fetch);
        continue;
      }
#endif
      vector_gemm<E>(rows, width, deep, View{A, part.row, 1}, B, width, c, ldc, k ? ADD : STORE, DEPTH, 0, fetch);
    }
  }
}

// Rows of a group as panels, `panel[k][m]` in units, rows past the last zero.
static void pack_panels(const uint32_t* const* rows, long count, long K, uint32_t* panels) {
  long padded = up(count, 16);
  for (long m = 0; m < padded; m += 16) {
    long width = least(PANEL, padded - m / PANEL * PANEL);
    uint32_t* out = panels + m / PANEL * PANEL * K + m % PANEL;
    for (long k = 0; k < K; k += 16) {
      v16 block[16];
      for (int i = 0; i < 16; i++) block[i] = m + i < count ? load(rows[m + i] + k) : v16{};
      transpose(block);
      for (int i = 0; i < 16; i++) store(out + (k + i) * width, block[i]);
    }
  }
}

static const long FEW = 4;  // rows that are multiplied by dot products

template <class E, int KIND>
static void hidden_block(
    const Problem& p, const Group& g, const float* gate, const float* up_half, long ldc, long h0, long outputs, uint32_t* hidden) {
  typedef typename E::T T;
  long width = p.H * (1 + p.gated), padded = up(g.rows, 16), K = p.H / E::PAIR;
  const void* b1 = p.b1 ? (const T*)p.b1 + g.expert * width : nullptr;
  T* pre = p.pre ? (T*)p.pre + g.begin * width + (g.first - g.begin) * 16 : nullptr;
  bool few = g.rows <= FEW;
  for (long m = 0; m < padded; m += 16)
    for (long h = 0; h < outputs; h += 16) {
      v16 z[16], u[16];
      long valid = least(16, g.rows - m);
      for (int i = 0; i < 16; i++) z[i] = load(gate + (h + i) * ldc + m) + splat_bias<E>(b1, h0 + h + i);
      if (p.gated)
        for (int i = 0; i < 16; i++) u[i] = load(up_half + (h + i) * ldc + m) + splat_bias<E>(b1, p.H + h0 + h + i);
      if (!few) {
        v16 a[16];
        for (int i = 0; i < 16; i++) a[i] = p.gated ? activated<KIND>(z[i]) * u[i] : activated<KIND>(z[i]);
        long panel = least(PANEL, padded - m / PANEL * PANEL);
        uint32_t* out = hidden + m / PANEL * PANEL * K + m % PANEL;
        for (int i = 0; i < 16; i += E::PAIR) {
          uint32_t* line = out + (h0 + h + i) / E::PAIR * panel;
          if (E::PAIR == 1) store(line, a[i]);
          else store_u(line, pair_rows(a[i], a[i + E::PAIR - 1]));
        }
      }
      if (pre || few) {
        transpose(z);
        if (p.gated) transpose(u);
        for (int i = 0; i < valid; i++) {
          if (pre) E::write(pre + (h0 + h) * g.total + (m + i) * 16, z[i]);
          if (pre && p.gated) E::write(pre + (p.H + h0 + h) * g.total + (m + i) * 16, u[i]);
          if (few) E::write((T*)hidden + i * p.H + h0 + h, p.gated ? activated<KIND>(z[i]) * u[i] : activated<KIND>(z[i]));
        }
      }
    }
}

template <class E>
static size_t forward(const Problem& p, bool run) {
  typedef typename E::T T;
  long padded, count = make_groups(p, CHUNK, 16, nullptr, &padded, false), R = p.E ? p.ends[p.E - 1] : 0;
  long KD = p.D / E::PAIR, KH = p.H / E::PAIR, width = p.H * (1 + p.gated);
  Arena arena = {run ? p.scratch : nullptr, 0};
  Group* groups = arena.take<Group>(count);
  uint32_t* panels = arena.take<uint32_t>(padded * KD);
  uint32_t* hidden = arena.take<uint32_t>(padded * KH);
  float* rows = arena.take<float>(R * p.D);
  int32_t* starts = arena.take<int32_t>(p.T + 1);
  int32_t* positions = arena.take<int32_t>(R);
  int32_t* next = arena.take<int32_t>(p.T);
  float* blocks = arena.take<float>(p.threads * 2 * OUTPUTS * CHUNK);
  if (!run) return arena.used;
  make_groups(p, CHUNK, 16, groups, &padded, false);
  index_tokens(p, starts, positions, next);
  bool packs = false;
  for (long i = 0; i < count; i++) packs |= groups[i].rows > FEW;
  long of_hidden = (p.H + OUTPUTS - 1) / OUTPUTS, of_out = (p.D + OUTPUTS - 1) / OUTPUTS;
  auto activate = p.activation == RELU   ? hidden_block<E, RELU>
                  : p.activation == GELU ? hidden_block<E, GELU>
                  : p.activation == SILU ? hidden_block<E, SILU>
                                         : hidden_block<E, GELU_TANH>;

#pragma omp parallel num_threads(p.threads)
  {
    float* C = blocks + omp_get_thread_num() * 2 * OUTPUTS * CHUNK;
    if (p.amx) tiles_on();
    if (packs) {
#pragma omp for schedule(dynamic, 1)
      for (long i = 0; i < count; i++) {
        const Group& g = groups[i];
        if (g.rows <= FEW) continue;
        const uint32_t* x[CHUNK];
        for (long m = 0; m < g.rows; m++) x[m] = (const uint32_t*)((const T*)p.x + p.token_ids[p.order[g.first + m]] * p.D);
        pack_panels(x, g.rows, KD, panels + g.padded * KD);
      }
    }
#pragma omp for schedule(dynamic, run_length(p, count * of_hidden))
    for (long i = 0; i < count * of_hidden; i++) {
      const Group& g = groups[i / of_hidden];
      long h0 = i % of_hidden * OUTPUTS, outputs = least(OUTPUTS, p.H - h0), ldc = up(g.rows, 16);
      const uint32_t* w = (const uint32_t*)p.w1 + (g.expert * width + h0) * KD;
      const uint32_t *few[FEW], *const *given = g.rows <= FEW ? few : nullptr;
      for (long m = 0; given && m < g.rows; m++) few[m] = (const uint32_t*)((const T*)p.x + p.token_ids[p.order[g.first + m]] * p.D);
      outputs_of<E>(p, g, w, outputs, KD, panels + g.padded * KD, given, C, ldc);
      if (p.gated) outputs_of<E>(p, g, w + p.H * KD, outputs, KD, panels + g.padded * KD, given, C + outputs * ldc, ldc);
      activate(p, g, C, C + outputs * ldc, ldc, h0, outputs, hidden + g.padded * KH);
    }
#pragma omp for schedule(dynamic, run_length(p, count * of_out))
    for (long i = 0; i < count * of_out; i++) {
      const Group& g = groups[i / of_out];
      long d0 = i % of_out * OUTPUTS, outputs = least(OUTPUTS, p.D - d0), ldc = up(g.rows, 16);
      const uint32_t *few[FEW], *const *given = g.rows <= FEW ? few : nullptr;
      for (long m = 0; given && m < g.rows; m++) few[m] = hidden + g.padded * KH + m * KH;
      outputs_of<E>(p, g, (const uint32_t*)p.w2 + (g.expert * p.D + d0) * KH, outputs, KH, hidden + g.padded * KH, given, C, ldc);
      const void* b2 = p.b2 ? (const T*)p.b2 + g.expert * p.D + d0 : nullptr;
      for (long m = 0; m < g.rows; m += 16)
        for (long d = 0; d < outputs; d += 16) {
          v16 z[16];
          for (int j = 0; j < 16; j++) z[j] = load(C + (d + j) * ldc + m) + splat_bias<E>(b2, d + j);
          transpose(z);
          for (long j = 0; j < least(16, g.rows - m); j++)
            store(rows + (g.first + m + j) * p.D + d0 + d, z[j] * p.weights[p.order[g.first + m + j]]);
        }
    }
    if (p.amx) tiles_off();
    sum_rows<E>(p, rows, starts, positions, p.y);
  }
  return arena.used;
}

// C[m][n] (+)= A[m][K] times `columns` columns of w, a matrix of K * PAIR rows `ldw` long, for bfloat16 as `pairs`.
template <class E>
static void times_columns(
    const Problem& p, const uint32_t* A, long lda, long M, long K, const typename E::T* w, long ldw, long columns, const uint32_t* pairs,
    float* C, Mode mode) {
#if HAVE_AMX
  if (E::PAIR == 2 && p.amx) return tile_gemm(up(M, 16), columns, K, A, lda, pairs, columns, C, columns, mode);
#endif
  if (E::PAIR == 2) return vector_gemm<E>(M, columns, K, View{A, lda, 1}, pairs, columns, C, columns, mode);
  const uint32_t* B = (const uint32_t*)w;
  if (M <= 2 * ROWS)  // w comes from memory for these rows alone: go through it row by row
    return vector_gemm<E>(M, columns, K, View{A, lda, 1}, B, ldw, C, columns, mode, 32, 32);
  for (long k = 0; k < K; k += SLAB) {
    long deep = least(SLAB, K - k), fetched = 0;
    const uint32_t* next = k + deep < K ? B + (k + deep) * ldw : B + columns;  // the block that comes then
    for (long n = 0; n < columns; n += PANEL)
      for (long m = 0; m < M; m += ROWS, fetched += 16) {
        Fetch fetch = fetched < deep ? Fetch{next + fetched * ldw, ldw, 16} : Fetch{};
        vector_gemm<E>(least(ROWS, M - m), least(PANEL, columns - n), deep, View{A + m * lda + k, lda, 1}, B + k * ldw + n, ldw,
                       C + m * columns + n, columns, k ? ADD : mode, DEPTH, 0, fetch);
      }
  }
}

// Two rows of a matrix of bfloat16 side by side, as pairs.
static void interleave(const bf16* a, const bf16* b, long columns, uint32_t* out) {
  for (long n = 0; n < columns; n += 16) {
    u16v lo = (u16v)(a ? load_bf16(a + n) : v16{}) >> 16, hi = b ? (u16v)load_bf16(b + n) : u16v{};
    store_u(out + n, lo | hi);
  }
}

// `columns` columns of w, (rows, ldw), as pairs of rows, `pairs[row / 2][column]`.
static void pair_up(const bf16* w, long ldw, long rows, long columns, uint32_t* pairs) {
  for (long k = 0; k < rows; k += 2, w += 2 * ldw) {
    for (long n = 0; n < columns; n += 32) __builtin_prefetch(w + 16 * ldw + n), __builtin_prefetch(w + 17 * ldw + n);
    interleave(w, w + ldw, columns, pairs + k / 2 * columns);
  }
}

// Up to 32 floats to a gradient's row, past the cache where lines are `aligned`.
template <class E>
static inline void write_line(typename E::T* out, const float* from, long count, bool aligned) {
  if (E::PAIR == 2 && count == 32) return store_bf16_line((bf16*)out, load(from), load(from + 16), aligned);
  for (long i = 0; i < count; i += 16)
    if (E::PAIR == 1 && aligned) stream((float*)out + i, load(from + i));
    else E::write(out + i, load(from + i));
}

// out[m][n] = sum over K of A[m][K] * B[K][n], the gradient of a block of weights. B is in panels of 32 columns if `panels`.
template <class E>
static void weight_grad(
    const Problem& p, long M, long N, long K, View a, const uint32_t* B, bool panels, typename E::T* out, long ldo, float* C) {
  const long BM = 48;
  bool aligned = ((uintptr_t)out | ldo * sizeof(typename E::T)) % 64 == 0;
  uint32_t copy[BM * DEPTH];
  for (long m = 0; m < M; m += BM) {
    long bm = least(BM, M - m);
    View part = {a.p + m * a.row, a.row, a.col};
    if (E::PAIR == 1 && K <= DEPTH) {
      for (long k = 0; k < K; k++) memcpy(copy + k * bm, part.p + k * a.col, bm * 4);
      part = View{copy, 1, bm};
    }
    for (long n = 0; n < N; n += PANEL) {
      long bn = least(PANEL, N - n), ldb = panels ? bn : N;
      const uint32_t* b = panels ? B + n * K : B + n;
      typename E::T* o = out + m * ldo + n;
      if (E::PAIR == 1 && K <= DEPTH) {
        vector_gemm<E>(bm, bn, K, part, b, ldb, (float*)o, ldo, aligned ? STREAM : STORE);
        continue;
      }
#if HAVE_AMX
      if (E::PAIR == 2 && p.amx)
        tile_gemm(bm, bn, K, part.p, a.row, b, ldb, C, bn, STORE);
      else
#endif
        vector_gemm<E>(bm, bn, K, part, b, ldb, C, bn, STORE);
      for (long i = 0; i < bm; i++) write_line<E>(o + i * ldo, C + i * bn, bn, aligned);
    }
  }
}

// What backward keeps of all rows, by padded row, and of one task, by thread.
template <class E>
struct Space {
  typename E::T* grad;     // gathered rows, `line` long: not a power of two
  uint32_t* x;             // gathered rows in units, in panels of 32 columns: [column / 32][row or pair of rows][32]
  typename E::T* dpre;     // of each expert: [slab][row][column]
  uint32_t* grad_t;        // bfloat16: of each expert, [column][pair of rows]
  float *rows, *parts;     // dx of each row; each slab's part of the routing weights' gradient
  uint32_t *pairs, *hidden, *dpre_t;  // of a task: columns of a weight as pairs, weighted hidden, bfloat16's dpre by pairs of rows
  float* C;
  long line;

  static long rows_of(const Group& g) { return E::PAIR == 2 ? up(g.rows, 32) : g.rows; }
  static long units_of(const Group& g) { return rows_of(g) / E::PAIR; }
  const uint32_t* grad_of(const Group& g, long row) const { return (const uint32_t*)(grad + (g.padded + row) * line); }
  uint32_t* x_of(const Group& g, const Problem& p) const { return x + g.padded / E::PAIR * p.D; }
  uint32_t* grad_t_of(const Group& g, const Problem& p) const { return grad_t + g.padded / 2 * p.D; }
  typename E::T* dpre_of(const Group& g, const Problem& p, long column) const {
    return dpre + g.padded * p.H * (1 + p.gated) + column * rows_of(g);
  }
};

// Gather rows of grad and x for 32 rows of a group, and the bias' part of the routing weights' gradient.
template <class E>
static void gather(const Problem& p, const Group& g, long r0, const Space<E>& s, float* part) {
  typedef typename E::T T;
  long valid = least(32, g.rows - r0), units = s.units_of(g);
  const T *grads[32] = {}, *xs[32] = {};
  for (long r = 0; r < valid; r++) {
    long token = p.token_ids[p.order[g.first + r0 + r]];
    grads[r] = (const T*)p.grad + token * p.D;
    xs[r] = (const T*)p.x + token * p.D;
    memcpy(s.grad + (g.padded + r0 + r) * s.line, grads[r], p.D * sizeof(T));
    if (p.b2 && p.dweights) {
      v16 total = {};
      for (long d = 0; d < p.D; d += 16) total += E::read((const T*)p.b2 + g.expert * p.D + d) * E::read(grads[r] + d);
      part[g.first + r0 + r] = sum(total);
    }
  }
  uint32_t* x = s.x_of(g, p);
  for (long d = 0; d < p.D; d += PANEL) {
    long columns = least(PANEL, p.D - d);
    uint32_t* panel = x + d * units + r0 / E::PAIR * columns;
    for (long r = 0; E::PAIR == 1 && r < valid; r++) memcpy(panel + r * columns, xs[r] + d, columns * sizeof(T));
    for (long r = 0; E::PAIR == 2 && r < 32; r += 2)
      interleave(xs[r] ? (const bf16*)xs[r] + d : nullptr, xs[r + 1] ? (const bf16*)xs[r + 1] + d : nullptr, columns, panel + r / 2 * columns);
  }
  for (long d = 0; E::PAIR == 2 && d < p.D; d += 16) {
    uint32_t pairs[16][16];
    for (long r = 0; r < 32; r += 2)
      interleave(grads[r] ? (const bf16*)grads[r] + d : nullptr, grads[r + 1] ? (const bf16*)grads[r + 1] + d : nullptr, 16, pairs[r / 2]);
    v16 lines[16];
    for (int i = 0; i < 16; i++) lines[i] = load(pairs[i]);
    transpose(lines);
    for (int i = 0; i < 16; i++) store(s.grad_t_of(g, p) + (d + i) * units + r0 / 2, lines[i]);
  }
}

// Rows m0.. of one slab, from dhidden `C`: dpre, weighted hidden, the routing weights' gradient, and the bias' into `db1`.
template <class E, int KIND>
static void activation_backward(
    const Problem& p, const Group& g, long m0, long rows, const float* C, long h0, long columns, const Space<E>& s, float* part, float* db1) {
  typedef typename E::T T;
  long width = p.H * (1 + p.gated), pairs = s.units_of(g);
  const T* pre = (const T*)p.pre + g.begin * width;
  T *dgate = s.dpre_of(g, p, h0), *dup = s.dpre_of(g, p, p.H + h0);
  for (long r0 = m0; r0 < m0 + rows; r0 += 32) {
    long valid = least(32, m0 + rows - r0);
    float shares[32] = {};
    for (long h = 0; h < columns; h += 16) {
      v16 hidden[32], gate[32], half[32], total = {}, total_half = {};
      for (long r = 0; r < 32; r++) {
        hidden[r] = gate[r] = half[r] = v16{};
        if (r >= valid) continue;
        float weight = p.weights[p.order[g.first + r0 + r]];
        v16 c = load(C + (r0 - m0 + r) * columns + h), cw = c * weight;
        Point a = activated_with_slope<KIND>(E::read(pre + (h0 + h) * g.total + (r0 + r) * 16));
        if (p.gated) {
          v16 u = E::read(pre + (p.H + h0 + h) * g.total + (r0 + r) * 16);
          half[r] = cw * a.value;
          cw *= u;
          a.value *= u;
          total_half += half[r];
          E::write(dup + (r0 + r) * columns + h, half[r]);
        }
        shares[r] += sum(a.value * c);
        hidden[r] = a.value * weight;
        gate[r] = cw * a.slope;
        total += gate[r];
        E::write(dgate + (r0 + r) * columns + h, gate[r]);
      }
      store(db1 + h, load(db1 + h) + total);
      store(db1 + columns + h, load(db1 + columns + h) + total_half);
      for (long r = 0; E::PAIR == 1 && r < valid; r++) store(s.hidden + (r0 + r) * columns + h, hidden[r]);
      for (long j = 0; E::PAIR == 2 && j <= p.gated; j++) {
        v16 block[16], *from = j ? half : gate;
        for (long r = 0; r < 16; r++) {
          if (!j) store_u(s.hidden + (r0 / 2 + r) * columns + h, pair_rows(hidden[2 * r], hidden[2 * r + 1]));
          block[r] = (v16)pair_rows(from[2 * r], from[2 * r + 1]);
        }
        transpose(block);
        for (long r = 0; r < 16; r++) store(s.dpre_t + (j * columns + h + r) * pairs + r0 / 2, block[r]);
      }
    }
    for (long r = 0; r < valid; r++) part[g.first + r0 + r] = shares[r];
  }
}

// One slab of an expert's hidden units: everything but dx.
template <class E>
static void slab_backward(const Problem& p, const Group& g, long h0, long columns, const Space<E>& s, float* part) {
  typedef typename E::T T;
  long width = p.H * (1 + p.gated), units = s.units_of(g);
  T* dw1 = p.dw1 ? (T*)p.dw1 + (g.expert * width + h0) * p.D : nullptr;
  T* dw2 = p.dw2 ? (T*)p.dw2 + g.expert * p.D * p.H + h0 : nullptr;
  float db1[2 * SLAB] = {};
  if (g.rows == 0) {
    for (long j = 0; dw1 && j <= p.gated; j++) memset(dw1 + j * p.H * p.D, 0, columns * p.D * sizeof(T));
    for (long d = 0; dw2 && d < p.D; d++) memset(dw2 + d * p.H, 0, columns * sizeof(T));
  } else {
    const T* w2 = (const T*)p.w2 + g.expert * p.D * p.H + h0;
    if (E::PAIR == 2) pair_up((const bf16*)w2, p.H, p.D, columns, s.pairs);
    for (long m0 = 0; m0 < g.rows; m0 += CHUNK) {
      long rows = least(CHUNK, g.rows - m0);
      times_columns<E>(p, s.grad_of(g, m0), s.line / E::PAIR, rows, p.D / E::PAIR, w2, p.H, columns, s.pairs, s.C, STORE);
      auto through = p.activation == RELU   ? activation_backward<E, RELU>
                     : p.activation == GELU ? activation_backward<E, GELU>
                     : p.activation == SILU ? activation_backward<E, SILU>
                                            : activation_backward<E, GELU_TANH>;
      through(p, g, m0, rows, s.C, h0, columns, s, part, db1);
    }
    View grad = E::PAIR == 2 ? View{s.grad_t_of(g, p), units, 1} : View{s.grad_of(g, 0), 1, s.line};
    if (dw2) weight_grad<E>(p, p.D, columns, units, grad, s.hidden, false, dw2, p.H, s.C);
    for (long j = 0; dw1 && j <= p.gated; j++) {
      View dpre = E::PAIR == 2 ? View{s.dpre_t + j * columns * units, units, 1}
                               : View{(const uint32_t*)s.dpre_of(g, p, j * p.H + h0), 1, columns};
      weight_grad<E>(p, columns, p.D, units, dpre, s.x_of(g, p), true, dw1 + j * p.H * p.D, p.D, s.C);
    }
  }
  for (long j = 0; p.db1 && j <= p.gated; j++)
    for (long h = 0; h < columns; h += 16) E::write((T*)p.db1 + g.expert * width + j * p.H + h0 + h, load(db1 + j * columns + h));
}

// Columns d0.. of dx of one expert's rows.
template <class E>
static void input_backward(const Problem& p, const Group& g, long d0, long columns, const Space<E>& s) {
  typedef typename E::T T;
  long width = p.H * (1 + p.gated);
  const T* w1 = (const T*)p.w1 + g.expert * width * p.D + d0;
  if (E::PAIR == 2) pair_up((const bf16*)w1, p.D, width, columns, s.pairs);
  for (long m0 = 0; m0 < g.rows; m0 += CHUNK) {
    long rows = least(CHUNK, g.rows - m0);
    for (long j = 0; j <= p.gated; j++)
      for (long h0 = 0; h0 < p.H; h0 += SLAB) {
        long slab = least(SLAB, p.H - h0), h = j * p.H + h0;
        times_columns<E>(p, (const uint32_t*)(s.dpre_of(g, p, h) + m0 * slab), slab / E::PAIR, rows, slab / E::PAIR, w1 + h * p.D, p.D, columns,
                         s.pairs + h / 2 * columns, s.C, h ? ADD : STORE);
      }
    for (long m = 0; m < rows; m++) memcpy(s.rows + (g.first + m0 + m) * p.D + d0, s.C + m * columns, columns * sizeof(float));
  }
}

template <class E>
static size_t backward(const Problem& p, bool run) {
  typedef typename E::T T;
  const long whole = 1l << 40;
  long pad = E::PAIR == 2 ? 32 : 1, padded, most = 0;
  long count = make_groups(p, whole, pad, nullptr, &padded, true), R = p.E ? p.ends[p.E - 1] : 0;
  long width = p.H * (1 + p.gated), of_hidden = (p.H + SLAB - 1) / SLAB, of_in = (p.D + SLAB - 1) / SLAB;
  for (long e = 0, start = 0; e < p.E; start = p.ends[e], e++) most = most > p.ends[e] - start ? most : p.ends[e] - start;
  Arena arena = {run ? p.scratch : nullptr, 0};
  Group* groups = arena.take<Group>(count);
  Space<E> all;
  all.line = p.D + 16 * E::PAIR;
  all.grad = arena.take<T>(padded * all.line);
  all.x = arena.take<uint32_t>(padded * p.D);
  all.grad_t = all.x + padded / 2 * p.D;  // used for bfloat16, whose x is half as long
  all.rows = (float*)all.x;               // written when x and grad_t were read for the last time
  all.dpre = arena.take<T>(padded * width);
  all.parts = arena.take<float>((of_hidden + 1) * R);
  int32_t* starts = arena.take<int32_t>(p.T + 1);
  int32_t* positions = arena.take<int32_t>(R);
  int32_t* next = arena.take<int32_t>(p.T);
  long of_pairs = E::PAIR == 2 ? (p.D > width ? p.D : width) / 2 * SLAB : 0, of_rows = up(most, 32) * SLAB / E::PAIR;
  long of_dpre = E::PAIR == 2 ? of_rows * (1 + p.gated) : 0, of_C = (CHUNK + 16) * SLAB;
  all.pairs = arena.take<uint32_t>(p.threads * of_pairs);
  all.hidden = arena.take<uint32_t>(p.threads * of_rows);
  all.dpre_t = arena.take<uint32_t>(p.threads * of_dpre);
  all.C = arena.take<float>(p.threads * of_C);
  if (!run) return arena.used;
  make_groups(p, whole, pad, groups, &padded, true);
  index_tokens(p, starts, positions, next);
  long of_group = (most + 31) / 32;

#pragma omp parallel num_threads(p.threads)
  {
    long thread = omp_get_thread_num();
    Space<E> s = all;
    s.pairs += thread * of_pairs, s.hidden += thread * of_rows, s.dpre_t += thread * of_dpre, s.C += thread * of_C;
    if (p.amx) tiles_on();
#pragma omp for schedule(dynamic, 4)
    for (long i = 0; i < count * of_group; i++) {
      long r0 = i % of_group * 32;
      if (r0 < groups[i / of_group].rows) gather<E>(p, groups[i / of_group], r0, s, s.parts + of_hidden * R);
    }
#pragma omp for schedule(dynamic, run_length(p, count * of_hidden))
    for (long i = 0; i < count * of_hidden; i++) {
      long slab = i % of_hidden, h0 = slab * SLAB;
      slab_backward<E>(p, groups[i / of_hidden], h0, least(SLAB, p.H - h0), s, s.parts + slab * R);
    }
    if (p.dx) {
#pragma omp for schedule(dynamic, run_length(p, count * of_in))
      for (long i = 0; i < count * of_in; i++) {
        long d0 = i % of_in * SLAB;
        if (groups[i / of_in].rows) input_backward<E>(p, groups[i / of_in], d0, least(SLAB, p.D - d0), s);
      }
      sum_rows<E>(p, s.rows, starts, positions, p.dx);
    }
    if (p.amx) tiles_off();
    if (p.dweights) {
#pragma omp for schedule(static) nowait
      for (long i = 0; i < p.N; i++) {
        float total = 0;
        for (long j = 0; i < R && j < of_hidden + (p.b2 != nullptr); j++) total += s.parts[j * R + i];
        p.dweights[p.order[i]] = total;
      }
    }
    if (p.db2) {
#pragma omp for schedule(dynamic, 1) nowait
      for (long i = 0; i < count; i++)
        for (long d = 0; d < p.D; d += 16) {
          const Group& g = groups[i];
          v16 total = {};
          for (long r0 = 0; r0 < g.rows; r0 += 32) {
            v16 part = {};
            for (long r = r0; r < least(r0 + 32, g.rows); r++)
              part += E::read((const T*)s.grad_of(g, r) + d) * p.weights[p.order[g.first + r]];
            total += part;
          }
          E::write((T*)p.db2 + g.expert * p.D + d, total);
        }
    }
  }
  return arena.used;
}

// Whether every index is in range: a wrong one would write where it should not.
static bool valid(const Problem& p) {
  long before = 0;
  for (long e = 0; e < p.E; before = p.ends[e++])
    if (p.ends[e] < before || p.ends[e] > p.N) return false;
  for (long i = 0; i < p.N; i++)
    if (p.order[i] < 0 || p.order[i] >= p.N || p.token_ids[i] < 0 || p.token_ids[i] >= p.T) return false;
  return true;
}

// Each returns how many bytes of scratch memory the problem takes, 0 if an index is out of range; where `run`, it also does
// the work, in the scratch memory given.
extern "C" size_t fastmoe_forward(const Problem* p, int run) {
  if (!run && !valid(*p)) return 0;
  return p->bfloat16 ? forward<BF16>(*p, run) : forward<F32>(*p, run);
}
extern "C" size_t fastmoe_backward(const Problem* p, int run) {
  if (!run && !valid(*p)) return 0;
  return p->bfloat16 ? backward<BF16>(*p, run) : backward<F32>(*p, run);
}
// A stable sort of rows by expert, id -1 last: `order` (N) and `ends` (E). Returns 0 if an id is out of range.
extern "C" int fastmoe_plan(const int64_t* ids, int64_t N, int64_t E, int64_t* order, int32_t* ends) {
  memset(ends, 0, E * sizeof(int32_t));
  for (int64_t i = 0; i < N; i++) {
    if (ids[i] < -1 || ids[i] >= E) return 0;
    if (ids[i] >= 0) ends[ids[i]]++;
  }
  int32_t routed = 0;
  for (int64_t e = 0; e < E; e++) {
    int32_t count = ends[e];
    ends[e] = routed;  // where the expert's rows start; each row moves it on, to where they end
    routed += count;
  }
  for (int64_t i = 0; i < N; i++) order[ids[i] < 0 ? routed++ : ends[ids[i]]++] = i;
  return 1;
}
// Whether bfloat16 may use AMX tiles here.
extern "C" int fastmoe_amx() { return tiles_allowed(); }
