// A cluster's key head: q, k, v, attention over the cache and the new token, and its part of the output projection.

struct Turn { float cos0, cos1, sin0, sin1; }; // of a lane's numbers, by the place of the token

__device__ __forceinline__ void attend(Worker &w, Held &held, const Layer &layer, int position, long stride, Turn turn,
                                       u32 &heard, u32 parity, u64 *out, u32 tag) {
  w.ask();
  Shared &s = w.s;
  Memory &m = w.m;
  int t = thread(), lane = w.lane, warp = w.warp, head = blockIdx.x / RANKS;
  u32 me = rank();
  int part = t / 16, row = me * 16 + t % 16; // of q, k, v, where t < 16 (G + 2)
  float bias = 0;
  if (QKV_BIAS && part < G + 2)
    bias = wide(part < G ? layer.q_bias[(head * G + part) * SIZE + row]
                         : (part == G ? layer.k_bias : layer.v_bias)[head * SIZE + row]);
  u32 b[2 * STEPS];
  hear(s, heard, layer.norm, b);
  float root = root_of(s);
  w.shares<G + 2>(held, b, G + 2);
  workers();
  if (part < G + 2) {
    float y = total(s, part, t % 16) * root + bias;
    u32 to = address(&s.qkv[part * SIZE + row]), barrier = address(&s.told_qkv);
#pragma unroll
    for (u32 peer = 0; peer < RANKS; peer++) tell(at_peer(to, peer), __float_as_uint(y), at_peer(barrier, peer));
  }
  Span span = span_of(position);
  int count = min(KEYS, span.stop - span.first), slabs = (count + 15) / 16;
  u32 key[8][4], values = 0;
  auto next_tokens = [&] { // keys in registers
    u32 keys = w.next() + warp * 4096;
    values = w.next();
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (warp < slabs) load_slab(key[k], keys + k / 4 * 2048 + w.corner(lane % 16, k % 4));
  };
  if (count) next_tokens();
  if (t == 0) expect(&s.told_qkv, sizeof(s.qkv));
  wait(&s.told_qkv, parity);

  // QK-norm and the rotary turn; the new token's key and value go to the cache, too.
  u64 place = position * stride + head * SIZE;
  for (int i = warp; i < G + 2; i += WARPS) {
    const float *from = s.qkv + i * SIZE + lane;
    float a0 = from[0], a1 = from[32], a2 = from[64], a3 = from[96];
    if (i <= G) {
      if (QK_NORM) {
        float each = rsqrtf(sum_of_warp(a0 * a0 + a1 * a1 + a2 * a2 + a3 * a3) * (1.f / SIZE) + EPS);
        a0 *= each, a1 *= each, a2 *= each, a3 *= each;
      }
      float c0 = a0 * turn.cos0 - a2 * turn.sin0, c1 = a1 * turn.cos1 - a3 * turn.sin1;
      a2 = a2 * turn.cos0 + a0 * turn.sin0, a3 = a3 * turn.cos1 + a1 * turn.sin1;
      a0 = c0, a1 = c1;
    }
    u16 *to = (i < G ? s.q[i] : i == G ? s.k : s.v) + lane;
    to[0] = narrow(a0), to[32] = narrow(a1), to[64] = narrow(a2), to[96] = narrow(a3);
    if (i >= G && me == 0) {
      u16 *kept = (i == G ? layer.keys : layer.values) + place + lane;
      kept[0] = narrow(a0), kept[32] = narrow(a1), kept[64] = narrow(a2), kept[96] = narrow(a3);
    }
  }
  workers();

  // The tokens before, a softmax that goes along with them; warp g keeps that of query g.
  const float scale = 1.4426950408889634f * 0.08838834764831845f; // log2(e) / sqrt(128): weights are powers of two
  float most = -infinity(), mass = 0, mixed[4] = {};
  u32 q0[8] = {}, q1[8] = {};
  if (lane / 4 < G)
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const u16 *from = &s.q[lane / 4][k * 16 + lane % 4 * 2];
      q0[k] = *(const u32 *)from, q1[k] = *(const u32 *)(from + 8);
    }
  if (int g = WARPS - 1 - warp; g < G) {
    float product = 0;
#pragma unroll
    for (int i = 0; i < SIZE; i += 32) product += wide(s.q[g][i + lane]) * wide(s.k[i + lane]);
    product = sum_of_warp(product);
    if (lane == 0) s.newest[g] = product * scale;
  }
  for (int first = span.first; first < span.stop; first += KEYS) {
    if (warp < slabs) {
      float c[2][4] = {};
#pragma unroll
      for (int k = 0; k < 8; k++) multiply(c[k % 2], key[k], q0[k], q1[k]);
      int token = warp * 16 + lane / 4, query = lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int which = token + i / 2 * 8, g = query + i % 2;
        if (g < G) s.scores[g][which] = which < count ? (c[0][i] + c[1][i]) * scale : -infinity();
      }
    }
    for (int i = count % 16 * 16 + t; i < 256 && count % 16; i += THREADS) // zero times what lies there may be NaN
      *(uint4 *)(m.ring[0] + (values - address(m.ring[0])) + (slabs - 1) * 4096 + i % 2 * 2048 + i / 16 * 128 +
                 i / 2 % 8 * 16) = uint4{0, 0, 0, 0};
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    workers();
    u32 value[KEYS / 16][4];
    int row = lane % 8 + lane / 16 * 8;
    u32 at = values + warp / 4 * 2048 + row * 128 + ((warp % 4 * 2 + lane / 8 % 2 ^ row % 8) * 16);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
      if (k < slabs) load_turned(value[k], at + k * 4096);
    if (warp < G) {
      float score[(KEYS + 31) / 32], higher = most;
#pragma unroll
      for (int i = 0; i < (KEYS + 31) / 32; i++) {
        int at = lane + i * 32;
        score[i] = at < slabs * 16 ? s.scores[warp][at] : -infinity();
        higher = fmaxf(higher, score[i]);
      }
      higher = most_of_warp(higher);
      float fade = exp2f(most - higher);
      mass *= fade; // each lane's own share
#pragma unroll
      for (int i = 0; i < (KEYS + 31) / 32; i++) {
        float weight = exp2f(score[i] - higher);
        mass += weight;
        if (lane + i * 32 < slabs * 16) s.weights[warp][lane + i * 32] = narrow(weight);
      }
      most = higher;
      if (lane == 0) s.fades[warp] = fade;
    }
    workers();
    float fade0 = s.fades[lane % 4 * 2], fade1 = s.fades[lane % 4 * 2 + 1], more[4] = {};
    mixed[0] *= fade0, mixed[1] *= fade1, mixed[2] *= fade0, mixed[3] *= fade1;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      if (k >= slabs) break;
      u32 b0 = 0, b1 = 0;
      if (lane / 4 < G) {
        const u16 *from = &s.weights[lane / 4][k * 16 + lane % 4 * 2];
        b0 = *(const u32 *)from, b1 = *(const u32 *)(from + 8);
      }
      multiply(k % 2 ? more : mixed, value[k], b0, b1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) mixed[i] += more[i];
    w.done(2);
    count = min(KEYS, span.stop - first - KEYS), slabs = (count + 15) / 16;
    if (count > 0) next_tokens();
  }

  // Every rank gets every rank's part.
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int g = lane % 4 * 2 + i % 2;
    if (g < G) s.mixed[g * SIZE + warp * 16 + lane / 4 + i / 2 * 8] = mixed[i];
  }
  u32 barrier = address(&s.told_parts);
  if (warp < G) mass = sum_of_warp(mass);
  if (warp < G && lane < RANKS) {
    u32 to = at_peer(address(s.masses[me][warp]), lane), there = at_peer(barrier, lane);
    tell(to, __float_as_uint(most), there);
    tell(to + 4, __float_as_uint(mass), there);
  }
  workers();
#pragma unroll
  for (int i = t; i < RANKS * G * SIZE / 4; i += THREADS) {
    u32 peer = i / (G * SIZE / 4), number = i % (G * SIZE / 4) * 4;
    tell(at_peer(address(&s.parts[me][number]), peer), *(float4 *)&s.mixed[number], at_peer(barrier, peer));
  }
  Boxes boxes;
  w.hold(boxes, G * 2);
  if (t == 0) expect(&s.told_parts, sizeof(s.parts) + sizeof(s.masses));
  wait(&s.told_parts, parity);
  for (int i = t; i < G * SIZE; i += THREADS) {
    int g = i / SIZE;
    float highest = s.newest[g], sum, y;
#pragma unroll
    for (int r = 0; r < RANKS; r++) highest = fmaxf(highest, s.masses[r][g][0]);
    sum = exp2f(s.newest[g] - highest);
    y = sum * wide(s.v[i % SIZE]);
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
      float weight = exp2f(s.masses[r][g][0] - highest);
      sum += weight * s.masses[r][g][1];
      y += weight * s.parts[r][i];
    }
    s.heads[i] = narrow(__fdividef(y, sum));
  }
  workers();
  w.whole<G * 2>(boxes, s.heads, G * 2, out + (u64)head * D + me * SLICE, tag);
}
