// A cluster's hidden units: gate and up, and their part of down.

struct Units { int first, count; }; // of a cluster
__device__ __forceinline__ Units units_of(int cluster) {
  if (cluster < K) return {cluster * LIGHT * 64, LIGHT * 64};
  int left = GROUPS - K * LIGHT, first = left * (cluster - K) / MLPS, stop = left * (cluster - K + 1) / MLPS;
  return {(K * LIGHT + first) * 64, (stop - first) * 64};
}

template <int MOST>
__device__ __forceinline__ void mlp(Worker &w, Held &held, int slabs, const Layer &layer, u32 &heard, u32 parity, u64 *out,
                                    u32 tag) {
  w.ask();
  Shared &s = w.s;
  int t = thread(), cluster = blockIdx.x / RANKS;
  int mine = slabs * 8;
  u32 me = rank(), b[2 * STEPS];
  hear(s, heard, layer.mlp_norm, b);
  float root = root_of(s);
  w.shares<MOST>(held, b, slabs);
  workers();
  if (t / 32 * 32 < mine) { // whole warps
    float y = 0;
    if (t < mine) {
      float gate = total(s, t / 8, t % 8) * root, up = total(s, t / 8, t % 8 + 8) * root;
      y = __fdividef(gate, 1.f + __expf(-gate)) * up;
    }
    u32 half = narrow(y), other = __shfl_xor_sync(~0u, half, 1);
    u32 both = t % 2 ? half << 16 | other : other << 16 | half;
    u32 to = address(s.hidden + me * mine + t / 2 * 2), barrier = address(&s.told_hidden);
    if (t < mine)
#pragma unroll
      for (int i = 0; i < RANKS / 2; i++) {
        u32 peer = t % 2 * (RANKS / 2) + i;
        tell(at_peer(to, peer), both, at_peer(barrier, peer));
      }
  }
  Boxes boxes;
  w.hold(boxes, slabs);
  if (t == 0) expect(&s.told_hidden, slabs * 128);
  wait(&s.told_hidden, parity);
  w.whole<MOST>(boxes, s.hidden, slabs, out + (u64)(LIGHT ? cluster : cluster - K) * D + me * SLICE, tag);
}
