// The step: who asks for which weights, embedding, layers, head, choice.

struct Step {
  const Layer *layers;
  const Maps *maps;
  const Map *head;
  const u16 *table, *norm;
  const float *cos, *sin;
  const u8 *forbidden;
  long *tokens, *chosen, *lengths, *produced;
  const long *active;
  float *logits;
  u64 *words; // [2][K][D], [2][MIXERS][D], [2][BLOCKS]
  u32 *steps; // done so far, and tokens chosen
  long stride;
  int pick;
};
constexpr int TILES = (V + 15) / 16;

__device__ void produce(Memory &m, const Step &step, int position) {
  Producer p(m);
  int me = rank(), cluster = blockIdx.x / RANKS;
  Span span = span_of(position);
  Units units = units_of(cluster);
  int mine = units.count / RANKS;
  for (int l = 0; l < LAYERS; l++) {
    const Maps &maps = step.maps[l];
    if (cluster < K) {
      for (int i = 0; i < 2 * (G + 2); i++) {
        int part = i / 2, row = me * 16 + i % 2 * 8;
        p.rows(part < G ? maps.q : part == G ? maps.k : maps.v, (part < G ? cluster * G + part : cluster) * SIZE + row);
      }
      for (int first = span.first; first < span.stop; first += KEYS) {
        Span some{first, min(first + KEYS, span.stop)};
        p.tokens(maps.keys, some, cluster), p.tokens(maps.values, some, cluster);
      }
      p.columns(maps.out, me * SLICE, cluster * G * 2, G * 2);
    }
    for (int i = 0; i < mine; i += 8)
      p.rows(maps.gate, units.first + me * mine + i), p.rows(maps.up, units.first + me * mine + i);
    p.columns(maps.down, me * SLICE, units.first / 64, units.count / 64);
  }
  p.depth = 3; // nobody waits any more
  for (int tile = blockIdx.x; tile < TILES; tile += BLOCKS)
    for (int i = 0; i < 16; i += 8) p.rows(*step.head, min(tile * 16, V - 16) + i);
}

// This thread's number of the token's embedding.
__device__ float embed(Shared &s, const Step &step) {
  int t = thread();
  const u16 *row = step.table + *step.tokens * D;
  float square = 0;
  for (int i = t; i < D; i += THREADS) square += wide(row[i]) * wide(row[i]);
  float x = t < SLICE ? wide(row[rank() * SLICE + t]) : 0.f;
  if (EMBED_NORM) {
    square = sum_of_warp(square);
    if (t % 32 == 0) s.sums[0][t / 32][0] = square;
    workers();
    x = rounded(x * rsqrtf(total(s, 0, 0) * (1.f / D) + EPS));
    workers();
  }
  return x;
}

// A float as an integer in the same order; then the row, so that of equals the first is the greatest.
__device__ __forceinline__ u64 ranked(float y, u32 row) {
  u32 bits = __float_as_uint(y);
  return (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | ~row;
}
__device__ __forceinline__ u64 best_of_warp(u64 best) {
#pragma unroll
  for (int i = 16; i; i /= 2) {
    u64 other = __shfl_xor_sync(~0u, best, i);
    best = other > best ? other : best;
  }
  return best;
}

__device__ void choose(Worker &w, const Step &step, u32 &heard, u64 *words, u32 tag) {
  Shared &s = w.s;
  int t = thread(), lane = w.lane;
  u32 b[2 * STEPS];
  hear(s, heard, step.norm, b);
  float root = root_of(s);
  u64 best = 0;
  int turn = 0;
  for (int tile = blockIdx.x; tile < TILES; tile += BLOCKS, turn++) {
    u32 row = min(tile * 16, V - 16) + lane;
    bool mine = turn % WARPS == w.warp && lane < 16;
    bool banned = mine && step.forbidden[row];
    u32 a[STEPS][4];
    w.take(a);
    w.done(2);
    w.give(a, b, turn % 2);
    workers();
    if (!mine) continue;
    float y = rounded(total(s, turn % 2, lane) * root); // as the plain path rounds it: both have the same ties
    if (CAP > 0) y = CAP * (__fdividef(2.f, 1.f + __expf(-2.f / CAP * y)) - 1.f);
    step.logits[row] = y;
    y = banned ? -infinity() : y == y ? y : infinity(); // a NaN must not hide
    u64 found = ranked(y, row);
    best = found > best ? found : best;
  }
  best = best_of_warp(best);
  if (lane == 0) s.best[w.warp] = best;
  workers();
  if (w.warp == 0) {
    best = best_of_warp(lane < WARPS ? s.best[lane] : 0);
    if (lane == 0) {
      say(words + blockIdx.x, tag, (u32)(best >> 32));
      say(words + BLOCKS + blockIdx.x, tag, (u32)best);
    }
  }
  if (blockIdx.x) return;
  best = 0;
  if (t < BLOCKS) {
    u64 high, low;
    u32 turns = 0;
    do {
      high = look(words + t), low = look(words + BLOCKS + t);
      too_long(turns);
    } while ((u32)(high >> 32) != tag || (u32)(low >> 32) != tag);
    best = high << 32 | (u32)low;
  }
  best = best_of_warp(best);
  workers();
  if (lane == 0) s.best[w.warp] = best;
  workers();
  if (w.warp == 0) {
    best = best_of_warp(lane < WARPS ? s.best[lane] : 0);
    if (lane == 0) {
      if (step.pick) {
        bool finite = best >> 32 < ranked(infinity(), 0) >> 32 && best >> 32 > ranked(-infinity(), 0) >> 32;
        step.chosen[step.steps[1]++ & 1] = finite ? (long)~(u32)best : -1;
        *step.tokens = finite ? (long)~(u32)best : 0;
        *step.lengths += *step.active;
        *step.produced += *step.active;
      }
      ++*step.steps; // every block has said its word, and so read this long ago
    }
  }
}

// All layers, in a cluster that attends or in one that does not: their loops are apart, so that neither keeps registers
// for what the other holds. Returns this thread's number of the stream behind them.
template <bool ATTENDS>
__device__ __forceinline__ float layers(Worker &w, const Step &step, int position, u32 done, float x, u32 &heard) {
  constexpr int MOST = ATTENDS ? LIGHT : HEAVY;
  int slabs = units_of(blockIdx.x / RANKS).count / 64, i = thread() % 32;
  const float *cos = step.cos + position * HALF + i, *sin = step.sin + position * HALF + i;
  Turn turn{cos[0], cos[32], sin[0], sin[32]};
  const u64 *attended = step.words + rank() * SLICE + thread(), *mixed = attended + 2 * (u64)K * D;
  for (int l = 0; l < LAYERS; l++) {
    // A word is written again two layers on, by when whoever must read it has answered in the layer between.
    u64 odd = l & 1;
    u32 tag = done * (LAYERS + 1) + l + 1;
    w.ask();
    if (ATTENDS) {
      Held held;
      w.hold(held, G + 2);
      if (l) x = add<MIXERS>(x, mixed + (1 - odd) * MIXERS * D, tag - 1);
      publish(w.s, x);
      attend(w, held, step.layers[l], position, step.stride, turn, heard, odd, step.words + odd * K * D, tag);
    }
    Held units;
    w.hold(units, slabs);
    if (!ATTENDS && l) x = add<MIXERS>(x, mixed + (1 - odd) * MIXERS * D, tag - 1);
    x = add<K>(x, attended + odd * K * D, tag);
    if (MOST) {
      publish(w.s, x);
      mlp<MOST>(w, units, slabs, step.layers[l], heard, odd, step.words + (2 * K + odd * MIXERS) * D, tag);
    }
  }
  return add<MIXERS>(x, mixed + (~LAYERS & 1) * (u64)MIXERS * D, done * (LAYERS + 1) + LAYERS);
}

__device__ __forceinline__ void work(Memory &m, const Step &step, int position, u32 done) {
  Worker w(m);
  u32 heard = 0;
  float x = embed(m.shared, step);
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  x = blockIdx.x / RANKS < K ? layers<true>(w, step, position, done, x, heard)
                             : layers<false>(w, step, position, done, x, heard);
  publish(m.shared, x);
  choose(w, step, heard, step.words + 2 * (K + MIXERS) * (u64)D, done * (LAYERS + 1) + LAYERS + 1);
}

// 128 threads for the one that asks for weights: registers are passed on by warpgroups (setmaxnreg).
extern "C" __global__ void __cluster_dims__(RANKS, 1, 1) __launch_bounds__(THREADS + 128, 1) decode(const Step step) {
  extern __shared__ __align__(1024) u8 memory[];
  Memory &m = *(Memory *)memory;
  Shared &s = m.shared;
  int t = threadIdx.x, position = (int)*step.lengths;
  u32 done = *step.steps;
  if (t == 0) {
    for (int i = 0; i < SLOTS; i++) barrier_init(&m.full[i], 1), barrier_init(&m.empty[i], WARPS);
    for (u64 *b : {&s.told_x, &s.told_qkv, &s.told_parts, &s.told_hidden}) barrier_init(b, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  if (t >= THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (t == THREADS) produce(m, step, position);
    __syncwarp();
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    cluster_sync();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    work(m, step, position, done);
    cluster_sync();
  }
}
