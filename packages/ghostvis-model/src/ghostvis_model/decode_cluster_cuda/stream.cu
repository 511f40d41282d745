// The residual stream: added up from what all clusters say, told within a cluster, heard by every block of it.

// x + what N clusters say of it, once they have.
template <int N> __device__ float add(float x, const u64 *words, u32 tag) {
  if (thread() < SLICE) {
    u64 word[N];
    u32 turns = 0;
    bool all;
#pragma unroll
    for (int i = 0; i < N; i++) word[i] = look(words + i * D);
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < N; i++)
        if ((u32)(word[i] >> 32) != tag) word[i] = look(words + i * D), all = false;
      too_long(turns);
    } while (!all);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum += __uint_as_float((u32)word[i]);
    x = rounded(x + sum);
  }
  return x;
}

// Tell all blocks of the cluster this one's slice of the stream.
__device__ void publish(Shared &s, float x) {
  int t = thread(), lane = t % 32;
  if (t / 32 >= SLICE_WARPS) return;
  x = t < SLICE ? x : 0.f;
  u32 mine = narrow(x), other = __shfl_xor_sync(~0u, mine, 1);
  u32 both = t % 2 ? mine << 16 | other : other << 16 | mine;
  u32 to = address(s.x + rank() * SLICE + t / 2 * 2), barrier = address(&s.told_x);
  if (t < SLICE)
#pragma unroll
    for (int i = 0; i < RANKS / 2; i++) {
      u32 peer = t % 2 * (RANKS / 2) + i;
      tell(at_peer(to, peer), both, at_peer(barrier, peer));
    }
  float square = sum_of_warp(x * x);
  if (lane < RANKS)
    tell(at_peer(address(&s.squares[rank() * SLICE_WARPS + t / 32]), lane), __float_as_uint(square),
         at_peer(barrier, lane));
}

// Wait for the whole stream; this warp's share of it, times the norm's weight, as the products' right side.
__device__ void hear(Shared &s, u32 &heard, const u16 *norm, u32 (&b)[2 * STEPS]) {
  int t = thread(), lane = t % 32, warp = t / 32;
  u16 weight[NORM ? (D + THREADS - 1) / THREADS : 1];
  if (NORM)
#pragma unroll
    for (int i = 0; i < (D + THREADS - 1) / THREADS; i++)
      if (t + i * THREADS < D) weight[i] = norm[t + i * THREADS];
  if (t == 0) expect(&s.told_x, D * 2 + sizeof(s.squares));
  wait(&s.told_x, heard++ & 1);
  const u16 *from = s.x;
  bool reads = lane < 4;
  if (NORM) {
#pragma unroll
    for (int i = 0; i < (D + THREADS - 1) / THREADS; i++) {
      int at = t + i * THREADS;
      if (at >= D) break;
      float x = wide(s.x[at]) * wide(weight[i]);
      s.high[at] = narrow(x);
      s.low[at] = narrow(x - rounded(x));
    }
    workers();
    from = lane < 4 ? s.high : s.low;
    reads = lane < 8;
  }
  from += warp * 16 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    b[2 * i] = reads ? *(const u32 *)(from + i * 128) : 0;
    b[2 * i + 1] = reads ? *(const u32 *)(from + i * 128 + 8) : 0;
  }
}

__device__ __forceinline__ float root_of(const Shared &s) {
  float4 sum = {};
#pragma unroll
  for (int i = 0; i < RANKS * SLICE_WARPS / 4; i++) {
    float4 more = ((const float4 *)s.squares)[i];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  return rsqrtf((sum.x + sum.y + (sum.z + sum.w)) * (1.f / D) + EPS);
}

__device__ __forceinline__ float total(const Shared &s, int slab, int row) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += s.sums[slab][w][row];
  return sum;
}
