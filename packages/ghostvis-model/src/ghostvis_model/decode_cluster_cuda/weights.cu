// Weights on their way: the ring in shared memory, who fills it, and who takes them from there into registers.

struct Span { int first, stop; }; // of the tokens before this one that a rank reads
__device__ __forceinline__ Span span_of(int position) {
  int each = ((position + RANKS - 1) / RANKS + 15) / 16 * 16, first = min((int)rank() * each, position);
  return {first, min(first + each, position)};
}

struct Producer {
  Memory &m;
  u32 index = 0, slot = 0, depth = 2; // portions under way at a time; more make everybody else wait for memory
  u64 policy;
  __device__ Producer(Memory &m) : m(m) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  // The place of the next portion, once it is free, of which so many bytes will be filled.
  __device__ u32 begin(u32 bytes) {
    slot = index % SLOTS;
    if (index >= SLOTS) wait(&m.empty[slot], (index / SLOTS - 1) & 1);
    if (index >= depth) wait(&m.full[(index - depth) % SLOTS], (index - depth) / SLOTS & 1);
    index++;
    expect(&m.full[slot], bytes);
    return address(m.ring[slot]);
  }
  __device__ void box(u32 to, const Map &map, int row, int column) {
    copy(to, map, row, column, &m.full[slot], policy);
  }
  __device__ void rows(const Map &map, int first) { box(begin(PORTION), map, first, 0); }
  __device__ void columns(const Map &map, int row, int first, int count) {
    for (int i = 0; i < count; i++) box(begin(PORTION), map, row, first + i);
  }
  __device__ void tokens(const Map &map, Span span, int head) {
    int boxes = (span.stop - span.first + 15) / 16;
    u32 to = begin(boxes * 16 * SIZE * 2);
    for (int i = 0; i < boxes; i++) box(to + i * 16 * SIZE * 2, map, span.first + i * 16, head * 2);
  }
};

// What a warp holds in registers of weights whose right side is not known yet. Of the first slabs of 16 rows, D wide, each
// eighth k-step; of the first boxes of SLICE rows and 64 columns one k-step of the four and each second slab.
constexpr int HELD = STEPS > 12 ? 1 : STEPS > 10 ? 2 : 3, MINE = (SLABS + 1) / 2, BOXES = 2;
struct Held { u32 a[HELD][STEPS][4]; };
struct Boxes { u32 a[BOXES][MINE][4]; };

struct Worker {
  Memory &m;
  Shared &s;
  int lane, warp;
  u32 index = 0;
  __device__ Worker(Memory &m) : m(m), s(m.shared) { ask(); }
  __device__ __forceinline__ void ask() { lane = thread() % 32, warp = thread() / 32; }
  __device__ u32 next() {
    u32 slot = index % SLOTS;
    wait(&m.full[slot], index / SLOTS & 1);
    __syncwarp();
    index++;
    return address(m.ring[slot]);
  }
  // The last `count` portions are read.
  __device__ void done(int count) {
    __syncwarp();
    if (lane < count) arrive(&m.empty[(index - 1 - lane) % SLOTS]);
  }
  // A lane's address in a box of rows 128 bytes long: its row, and its 16-byte piece of a k-step's 32 bytes.
  __device__ u32 corner(int row, int step) { return row * 128 + ((step * 2 + lane / 16 ^ row % 8) * 16); }

  // Its share of the next slab.
  __device__ __forceinline__ void take(u32 (&a)[STEPS][4]) {
    u32 low = next(), high = next();
    u32 at = (lane & 8 ? high : low) + warp / 4 * 1024 + corner(lane % 8, warp % 4);
#pragma unroll
    for (int i = 0; i < STEPS; i++) load_slab(a[i], at + i * 2048);
  }
  // Its share times b: 16 sums to `s.sums[which]`.
  __device__ __forceinline__ void give(const u32 (&a)[STEPS][4], const u32 (&b)[2 * STEPS], int which) {
    float c[2][4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; i++) multiply(c[i % 2], a[i], b[2 * i], b[2 * i + 1]);
    if (lane % 4 == 0) { // column 0 is the product, column 1 that with the low halves
      s.sums[which][warp][lane / 4] = c[0][0] + c[1][0] + (c[0][1] + c[1][1]);
      s.sums[which][warp][lane / 4 + 8] = c[0][2] + c[1][2] + (c[0][3] + c[1][3]);
    }
  }
  // The first slabs of so many that come next.
  __device__ __forceinline__ void hold(Held &held, int slabs) {
#pragma unroll
    for (int n = 0; n < HELD; n++)
      if (n < slabs) take(held.a[n]);
    done(2 * min(HELD, slabs));
  }
  // All of them times b.
  template <int MOST> __device__ __forceinline__ void shares(Held &held, const u32 (&b)[2 * STEPS], int slabs) {
#pragma unroll
    for (int n = 0; n < MOST; n++) {
      if (n < slabs) give(held.a[n % HELD], b, n);
      if (n && n + HELD <= slabs) done(2); // taken a turn ago: to be done waits for the loads, which now are
      if (n + HELD < slabs) take(held.a[n % HELD]);
    }
  }
  // Its share of the next box.
  __device__ __forceinline__ void take(u32 (&a)[MINE][4]) {
    int odd = warp / 4;
    u32 at = next() + odd * 2048 + corner(lane % 16, warp % 4);
#pragma unroll
    for (int i = 0; i < MINE; i++) load_slab(a[i], at + min(i, (SLABS - 1 - odd) / 2) * 4096);
  }
  // The first boxes of so many that come next.
  __device__ __forceinline__ void hold(Boxes &held, int boxes) {
#pragma unroll
    for (int n = 0; n < BOXES; n++)
      if (n < boxes) take(held.a[n]);
    done(min(BOXES, boxes));
  }
  // SLICE rows times b [64 boxes], the first of them held: tagged partial sums to out [SLICE].
  template <int MOST>
  __device__ __forceinline__ void whole(Boxes &held, const u16 *b, int boxes, u64 *out, u32 tag) {
    int step = warp % 4, odd = warp / 4, t = thread();
    float c[MINE][4] = {};
    const u16 *mine = b + step * 16 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < MOST; n++) {
      if (n >= boxes) break;
      u32 b0 = 0, b1 = 0;
      if (lane < 4) b0 = *(const u32 *)(mine + n * 64), b1 = *(const u32 *)(mine + n * 64 + 8);
#pragma unroll
      for (int i = 0; i < MINE; i++) multiply(c[i], held.a[n % BOXES][i], b0, b1);
      if (n && n + BOXES <= boxes) done(1);
      if (n + BOXES < boxes) take(held.a[n % BOXES]);
    }
    if (lane % 4 == 0)
#pragma unroll
      for (int i = 0; i < MINE; i++) {
        float *to = &s.quarters[step][(2 * i + odd) * 16 + lane / 4];
        if (2 * i + odd < SLABS) to[0] = c[i][0], to[8] = c[i][2];
      }
    workers();
    if (t < SLICE)
      say(out + t, tag, __float_as_uint(s.quarters[0][t] + s.quarters[1][t] + (s.quarters[2][t] + s.quarters[3][t])));
  }
};
