// What stands between the products of a transformer, for GPUs: one pass over memory each, arithmetic in f32.
//
// Compiled when a model is loaded, for the GPU that is there, by NVRTC, which has no headers: types and helpers are spelt
// out here. The host's side, with the shapes, is fused.rs; the geometry of the launches is launch.rs. With SHIM defined
// the same kernels compile as C++ (shim.h), which is how they are tested without a GPU.

#ifdef SHIM
#include "shim.h"
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

// As `Args` in launch.rs.
struct Args {
  void *to;
  const void *from;
  const void *bias;
  const void *residual;
  const void *memory;  // keys and values of a layer, [slots, 2, columns, width]
  const u32 *starts;  // of each row of the decoder: where its new tokens begin, or whether it does not take the end
  u32 rows;     // of what a block or a warp does one of
  u32 width;    // of a row
  u32 heads;
  u32 head;     // width of one
  u32 tokens;   // of an image
  u32 padded;   // the same, filled up
  u32 images;
  u32 parts;    // of a row, each as wide as `width`
  u32 columns;  // tokens that a slot has room for
  u32 block;    // new tokens of a row
  u32 stride;   // from a token's queries to the next one's
  u32 size;     // of a picture, in pixels: its side
  u32 patch;    // of a patch
  u32 end;      // the token that some rows do not take
  float scale;
};

struct Bf16 { unsigned short bits; };
struct F16 { unsigned short bits; };

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(Bf16 x) { return __uint_as_float((u32)x.bits << 16); }

__device__ inline void narrow(float x, float &to) { to = x; }
// To the nearest, to the even one of two; what is not a number stays none.
__device__ inline void narrow(float x, Bf16 &to) {
  u32 bits = __float_as_uint(x);
  to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#ifndef SHIM
__device__ inline float wide(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline void narrow(float x, F16 &to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
#else
__device__ inline float wide(F16 x) { return half_to_float(x.bits); }
__device__ inline void narrow(float x, F16 &to) { to.bits = float_to_half(x); }
#endif

// Neighbours that are read and written at once, 16 bytes where shapes allow.
template <class T, u32 N> struct alignas(N * sizeof(T)) Pack { T of[N]; };

template <class T, u32 N> __device__ inline Pack<T, N> read(const void *from, u64 at) {
  return *(const Pack<T, N> *)((const T *)from + at);
}

template <class T, u32 N> __device__ inline void write(void *to, u64 at, Pack<T, N> pack) {
  *(Pack<T, N> *)((T *)to + at) = pack;
}

enum Finish { BIAS, GELU, ADD };

// to = what follows a product, in place: + bias, and the exact GELU or + residual. A block does a row.
template <class T, u32 N, Finish FINISH> __device__ inline void finish(const Args &a) {
  u64 row = (u64)blockIdx.x * a.width;
  for (u32 column = threadIdx.x * N; column < a.width; column += blockDim.x * N) {
    Pack<T, N> x = read<T, N>(a.to, row + column), bias = read<T, N>(a.bias, column), residual;
    if (FINISH == ADD) residual = read<T, N>(a.residual, row + column);
    for (u32 i = 0; i < N; i++) {
      float y = wide(x.of[i]) + wide(bias.of[i]);
      if (FINISH == GELU) y = 0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
      if (FINISH == ADD) y += wide(residual.of[i]);
      narrow(y, x.of[i]);
    }
    write<T, N>(a.to, row + column, x);
  }
}

template <class T, u32 N> __device__ inline void finish_bias(const Args &a) { finish<T, N, BIAS>(a); }
template <class T, u32 N> __device__ inline void finish_gelu(const Args &a) { finish<T, N, GELU>(a); }
template <class T, u32 N> __device__ inline void finish_add(const Args &a) { finish<T, N, ADD>(a); }

// from [images, tokens, 3, heads, head] + bias, to [3, images, heads, padded, head]: queries, which are multiplied by
// scale, keys and values. What fills up is 0. A block does a token.
template <class T, u32 N> __device__ inline void split_heads(const Args &a) {
  u32 image = blockIdx.x / a.padded, token = blockIdx.x % a.padded;
  u64 row = ((u64)image * a.tokens + token) * 3 * a.width;
  for (u32 column = threadIdx.x * N; column < 3 * a.width; column += blockDim.x * N) {
    Pack<T, N> x;
    u32 part = column / a.width, head = column % a.width / a.head, inner = column % a.head;
    if (token < a.tokens) {
      Pack<T, N> bias = read<T, N>(a.bias, column);
      x = read<T, N>(a.from, row + column);
      for (u32 i = 0; i < N; i++) narrow((wide(x.of[i]) + wide(bias.of[i])) * (part == 0 ? a.scale : 1.0f), x.of[i]);
    } else {
      for (u32 i = 0; i < N; i++) narrow(0.0f, x.of[i]);
    }
    u64 to = (((u64)part * a.images + image) * a.heads + head) * a.padded + token;
    write<T, N>(a.to, to * a.head + inner, x);
  }
}

// from [images, heads, padded, head] to [images, tokens, heads, head]. A block does a token.
template <class T, u32 N> __device__ inline void join_heads(const Args &a) {
  u32 image = blockIdx.x / a.tokens, token = blockIdx.x % a.tokens;
  for (u32 column = threadIdx.x * N; column < a.width; column += blockDim.x * N) {
    u64 from = ((u64)image * a.heads + column / a.head) * a.padded + token;
    write<T, N>(a.to, (u64)blockIdx.x * a.width + column, read<T, N>(a.from, from * a.head + column % a.head));
  }
}

// from [tokens, parts, width] + bias, to [parts, tokens, width]. A block does a token.
template <class T, u32 N> __device__ inline void split_parts(const Args &a) {
  u64 row = (u64)blockIdx.x * a.parts * a.width;
  for (u32 column = threadIdx.x * N; column < a.parts * a.width; column += blockDim.x * N) {
    Pack<T, N> x = read<T, N>(a.from, row + column), bias = read<T, N>(a.bias, column);
    for (u32 i = 0; i < N; i++) narrow(wide(x.of[i]) + wide(bias.of[i]), x.of[i]);
    u64 to = (u64)(column / a.width) * a.tokens + blockIdx.x;
    write<T, N>(a.to, to * a.width + column % a.width, x);
  }
}

// from [rows, block, 3, width], of which the last two are keys and values, to what is remembered, which is `to` here: each
// row's behind what it has. A block does a token.
template <class T, u32 N> __device__ inline void append(const Args &a) {
  u32 row = blockIdx.x / a.block, at = a.starts[row] + blockIdx.x % a.block;
  u64 from = ((u64)blockIdx.x * 3 + 1) * a.width;
  for (u32 column = threadIdx.x * N; column < 2 * a.width; column += blockDim.x * N) {
    u64 to = ((u64)row * 2 + column / a.width) * a.columns + at;
    write<T, N>(a.to, to * a.width + column % a.width, read<T, N>(a.from, from + column));
  }
}

// from the bytes of pictures, [images, size, size, 3], to their patches, [images, grid, grid, 3, patch, patch]: a byte
// becomes what bias, f32 [3, 256], says. Pixels that fill no patch are left out. A block does a patch.
template <class T, u32 N> __device__ inline void unfold(const Args &a) {
  u32 grid = a.size / a.patch, image = blockIdx.x / (grid * grid);
  u32 top = blockIdx.x / grid % grid * a.patch, left = blockIdx.x % grid * a.patch;
  const unsigned char *bytes = (const unsigned char *)a.from + (u64)image * a.size * a.size * 3;
  const float *levels = (const float *)a.bias;
  for (u32 column = threadIdx.x * N; column < a.width; column += blockDim.x * N) {
    u32 channel = column / (a.patch * a.patch), y = top + column / a.patch % a.patch, x = left + column % a.patch;
    Pack<T, N> to;
    for (u32 i = 0; i < N; i++) {
      narrow(levels[channel * 256 + bytes[((u64)y * a.size + x + i) * 3 + channel]], to.of[i]);
    }
    write<T, N>(a.to, (u64)blockIdx.x * a.width + column, to);
  }
}

__device__ inline float of_warp(float x, bool sum) {
  for (u32 step = 16; step > 0; step /= 2) {
    float other = __shfl_xor_sync(0xffffffff, x, step);
    x = sum ? x + other : fmaxf(x, other);
  }
  return x;
}

// to [rows, padded] = the softmax of each row's first `tokens`, in place; the rest becomes 0. A warp does a row, and keeps
// it in registers: a row is no longer than 32 * READS packs.
const u32 READS = 8;

template <class T, u32 N> __device__ inline void softmax(const Args &a) {
  u32 which = blockIdx.x * blockDim.y + threadIdx.y;
  if (which >= a.rows) return;
  u64 row = (u64)which * a.padded;
  float x[READS][N], top = -3.4e38f, sum = 0.0f;
#pragma unroll
  for (u32 turn = 0; turn < READS; turn++) {
    u32 column = (turn * 32 + threadIdx.x) * N;
    if (column >= a.padded) continue;
    Pack<T, N> pack = read<T, N>(a.to, row + column);
    for (u32 i = 0; i < N; i++) {
      x[turn][i] = column + i < a.tokens ? wide(pack.of[i]) : -3.4e38f;
      top = fmaxf(top, x[turn][i]);
    }
  }
  top = of_warp(top, false);
#pragma unroll
  for (u32 turn = 0; turn < READS; turn++) {
    u32 column = (turn * 32 + threadIdx.x) * N;
    if (column >= a.padded) continue;
    for (u32 i = 0; i < N; i++) {
      x[turn][i] = column + i < a.tokens ? expf(x[turn][i] - top) : 0.0f;
      sum += x[turn][i];
    }
  }
  float share = 1.0f / of_warp(sum, true);
#pragma unroll
  for (u32 turn = 0; turn < READS; turn++) {
    u32 column = (turn * 32 + threadIdx.x) * N;
    if (column >= a.padded) continue;
    Pack<T, N> pack;
    for (u32 i = 0; i < N; i++) narrow(x[turn][i] * share, pack.of[i]);
    write<T, N>(a.to, row + column, pack);
  }
}

// Attention of a few tokens of each row on keys and values that are remembered. from [rows, block, stride] begins with the
// queries, to is [rows, block, width]. A token sees its row up to itself, where there are starts, and a.tokens elsewhere.
//
// A block does a head of a token, so that keys and values are read once. Eight lanes do a column together, 32 such groups
// every 32nd one; each keeps its highest score, and the sum and the context of what it saw relative to that (the online
// softmax of Milakov and Gimelshein, arXiv 1805.02867), which are brought together in the end.
const u32 LANES = 8, GROUPS = 32, WIDEST_HEAD = 128;

template <class T, u32 N> __device__ inline void attend_rows(const Args &a) {
  const u32 PACKS = N == 1 ? WIDEST_HEAD / LANES : WIDEST_HEAD / (LANES * N);
  __shared__ float tops[GROUPS], sums[GROUPS], contexts[GROUPS][WIDEST_HEAD];
  u32 head = blockIdx.x % a.heads, token = blockIdx.x / a.heads, row = token / a.block;
  u32 length = a.starts ? a.starts[row] + token % a.block + 1 : a.tokens;
  u32 lane = threadIdx.x % LANES, group = threadIdx.y * (32 / LANES) + threadIdx.x / LANES;
  u64 keys = (u64)row * 2 * a.columns * a.width + head * a.head;
  u64 values = keys + (u64)a.columns * a.width;
  float query[PACKS][N], context[PACKS][N], top = -1e30f, sum = 0.0f;
#pragma unroll
  for (u32 pack = 0; pack < PACKS; pack++) {
    u32 inner = (pack * LANES + lane) * N;
    Pack<T, N> x;
    if (inner < a.head) x = read<T, N>(a.from, (u64)token * a.stride + head * a.head + inner);
    for (u32 i = 0; i < N; i++) {
      query[pack][i] = inner < a.head ? wide(x.of[i]) * a.scale : 0.0f;
      context[pack][i] = 0.0f;
    }
  }
  for (u32 first = 0; first < length; first += GROUPS) {
    u32 column = first + group;
    float score = 0.0f;
    if (column < length) {
#pragma unroll
      for (u32 pack = 0; pack < PACKS; pack++) {
        u32 inner = (pack * LANES + lane) * N;
        if (inner >= a.head) continue;
        Pack<T, N> key = read<T, N>(a.memory, keys + (u64)column * a.width + inner);
        for (u32 i = 0; i < N; i++) score += query[pack][i] * wide(key.of[i]);
      }
    }
    for (u32 step = LANES / 2; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffff, score, step);
    if (column >= length) continue;
    float higher = fmaxf(top, score), old = expf(top - higher), share = expf(score - higher);
    sum = sum * old + share;
    top = higher;
#pragma unroll
    for (u32 pack = 0; pack < PACKS; pack++) {
      u32 inner = (pack * LANES + lane) * N;
      if (inner >= a.head) continue;
      Pack<T, N> value = read<T, N>(a.memory, values + (u64)column * a.width + inner);
      for (u32 i = 0; i < N; i++) context[pack][i] = context[pack][i] * old + share * wide(value.of[i]);
    }
  }
  if (lane == 0) tops[group] = top, sums[group] = sum;
#pragma unroll
  for (u32 pack = 0; pack < PACKS; pack++) {
    u32 inner = (pack * LANES + lane) * N;
    if (inner >= a.head) continue;
    for (u32 i = 0; i < N; i++) contexts[group][inner + i] = context[pack][i];
  }
  __syncthreads();
  for (u32 column = threadIdx.y * 32 + threadIdx.x; column < a.head; column += 32 * blockDim.y) {
    float highest = -1e30f, total = 0.0f, y = 0.0f;
    for (u32 of = 0; of < GROUPS; of++) highest = fmaxf(highest, tops[of]);
    for (u32 of = 0; of < GROUPS; of++) {
      float share = expf(tops[of] - highest);
      total += sums[of] * share;
      y += contexts[of][column] * share;
    }
    narrow(y / total, ((T *)a.to)[(u64)token * a.width + head * a.head + column]);
  }
}

// from scores [rows, width], to f32 [rows, 2]: the first of each row's highest, which is not `end` where the row's start is
// not 0, and the logarithm of its share in the softmax of the whole row. A token is below 2^24, which f32 has exactly.
// A block does a row: a top, a sum relative to it and a choice for each thread, then each warp, then the block.
template <class T, u32 N> __device__ inline void choose(const Args &a) {
  const u32 WARPS = 8;
  const float NONE = 16777216.0f;
  __shared__ float tops[WARPS], sums[WARPS], bests[WARPS], tokens[WARPS];
  bool held = a.starts[blockIdx.x] != 0;
  float top = -3.4e38f, sum = 0.0f, best = -3.4e38f, token = NONE;
  for (u32 column = (threadIdx.y * 32 + threadIdx.x) * N; column < a.width; column += 32 * WARPS * N) {
    Pack<T, N> scores = read<T, N>(a.from, (u64)blockIdx.x * a.width + column);
    for (u32 i = 0; i < N; i++) {
      float score = wide(scores.of[i]), higher = fmaxf(top, score);
      sum = sum * expf(top - higher) + expf(score - higher);
      top = higher;
      if (score > best && !(held && column + i == a.end)) best = score, token = column + i;
    }
  }
  float of_all = of_warp(top, false), of_best = of_warp(best, false);
  sum = of_warp(sum * expf(top - of_all), true);
  token = -of_warp(best == of_best ? -token : -NONE, false);
  if (threadIdx.x == 0) {
    u32 warp = threadIdx.y;
    tops[warp] = of_all, sums[warp] = sum, bests[warp] = of_best, tokens[warp] = token;
  }
  __syncthreads();
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  top = of_all, best = of_best, sum = 0.0f;
  for (u32 warp = 1; warp < WARPS; warp++) {
    top = fmaxf(top, tops[warp]);
    if (bests[warp] > best || (bests[warp] == best && tokens[warp] < token)) best = bests[warp], token = tokens[warp];
  }
  for (u32 warp = 0; warp < WARPS; warp++) sum += sums[warp] * expf(tops[warp] - top);
  ((float *)a.to)[2 * blockIdx.x] = token;
  ((float *)a.to)[2 * blockIdx.x + 1] = best - top - logf(sum);
}

#ifdef SHIM
#define BY_VALUE const Args &
#else
#define BY_VALUE Args
#endif
#define KERNEL(name, dtype, T, N) \
  extern "C" __global__ void name##_##dtype##_##N(BY_VALUE a) { name<T, N>(a); }
#define KERNELS(name) \
  KERNEL(name, f32, float, 1) \
  KERNEL(name, f32, float, 4) \
  KERNEL(name, bf16, Bf16, 1) \
  KERNEL(name, bf16, Bf16, 8) \
  KERNEL(name, f16, F16, 1) \
  KERNEL(name, f16, F16, 8)

KERNELS(finish_bias)
KERNELS(finish_gelu)
KERNELS(finish_add)
KERNELS(split_heads)
KERNELS(join_heads)
KERNELS(split_parts)
KERNELS(append)
KERNELS(attend_rows)
KERNELS(softmax)
KERNELS(unfold)
KERNELS(choose)
