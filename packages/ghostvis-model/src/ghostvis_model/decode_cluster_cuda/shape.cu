// One decoding step of one row, embedding to chosen token, in one launch of one block on each multiprocessor (sm_90).
//
// Blocks stand in clusters of 8. The first K clusters each own a key head: its q, k, v, its keys and values, its columns
// of the output projection. The others share the MLP's hidden units. Within a cluster numbers pass from shared memory to
// shared memory; between clusters they pass twice a layer, as partial sums of the stream, each in one 64-bit word with
// the number of the exchange, so that a word is its own signal. One thread of every block does nothing but ask for
// weights, in the order of their use and as far ahead as shared memory holds.
//
// The order of a layer: the stream of everybody's partial sums is added up and told within each cluster (stream); the
// clusters of attention make q, k and v, attend to their eighth of the tokens each, put the eighths together, and say
// their partial sums of the output projection (attention); all clusters that have hidden units do likewise with the MLP
// (mlp). What a warp will multiply next it has in registers before it knows by what (weights). After the last layer every
// block takes its tiles of the head, and the first block the likeliest token of all (step).
//
// These files are one program, in the order shape, instructions, weights, stream, attention, mlp, step. Written before
// them when they are compiled: D, F, V, LAYERS, H, K, CLUSTERS, LIGHT, EPS, CAP (0: none) and the bools QK_NORM, NORM
// (norms have weights), EMBED_NORM, QKV_BIAS. Heads are 128 wide; everything is bfloat16 and added up in float32.
//
// What decided the form is in BENCHMARKS.md: two portions under way (more make the exchanges wait), no spills, no trap.
//
// "Stream" is the residual stream x [D]; rank r of a cluster keeps its numbers [r SLICE, (r + 1) SLICE).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int RANKS = 8, WARPS = 8, THREADS = 32 * WARPS, SIZE = 128, HALF = SIZE / 2;
constexpr int G = H / K, MLPS = CLUSTERS - K, BLOCKS = CLUSTERS * RANKS;
constexpr int SLICE = D / RANKS, SLABS = SLICE / 16, SLICE_WARPS = (SLICE + 31) / 32;
constexpr int STEPS = D / 16 / WARPS; // k-steps of one warp where all warps share a row

// The MLP's hidden units go to clusters by 64: LIGHT times so many to each that attends, up to HEAVY to the others.
constexpr int GROUPS = F / 64, HEAVY = (GROUPS - K * LIGHT + MLPS - 1) / MLPS, MIXERS = LIGHT ? CLUSTERS : MLPS;
constexpr int MOST_SLABS = HEAVY > G + 2 ? HEAVY : G + 2;
static_assert(D % 128 == 0 && F % 64 == 0 && H % K == 0 && G <= 8 && MLPS > 0 && SLICE <= THREADS && V >= 16, "");

// Weights come in portions of one size, as the copy engine lays out boxes of 64 columns: [box][row][64], the 16-byte
// pieces of a row swapped by its number, so that eight rows' pieces of one column lie in eight different banks.
constexpr u32 PORTION = 16 * D; // bytes: eight rows D wide, or 64 columns of SLICE rows
constexpr int KEYS = D / 256 * 16; // or so many tokens

// Shared memory: the ring of weights, then what blocks of a cluster tell each other, and scratch.
struct Shared {
  u64 told_x, told_qkv, told_parts, told_hidden;
  alignas(16) u16 x[D]; // the stream
  alignas(16) float squares[RANKS * SLICE_WARPS]; // of it
  alignas(16) u16 high[NORM ? D : 1], low[NORM ? D : 1]; // the stream times the norm's weight, in two bfloat16
  union {
    alignas(16) float qkv[(G + 2) * SIZE];
    float mixed[G * SIZE];
  };
  alignas(16) float parts[RANKS][G * SIZE]; // of attention: mixed values, not yet divided
  float masses[RANKS][G][2]; // their largest score and sum
  alignas(16) u16 hidden[64 * HEAVY];
  union {
    alignas(16) float sums[MOST_SLABS > 4 ? MOST_SLABS : 4][WARPS][16];
    float quarters[4][SLICE];
  };
  alignas(16) u16 q[8][SIZE + 8];
  alignas(16) u16 k[SIZE], v[SIZE];
  alignas(16) float scores[G][KEYS];
  alignas(16) u16 weights[8][KEYS + 8];
  float fades[8], newest[8];
  alignas(16) u16 heads[G * SIZE];
  u64 best[WARPS];
};
constexpr int FIT = (227 * 1024 - sizeof(Shared) - 1024) / PORTION, SLOTS = FIT < 32 ? FIT : 32;
struct Memory {
  alignas(1024) u8 ring[SLOTS][PORTION];
  u64 full[SLOTS], empty[SLOTS];
  Shared shared;
};
static_assert(SLOTS >= 4 && sizeof(Shared) % 16 == 0 && PORTION % 1024 == 0 && KEYS * SIZE * 2 <= PORTION, "");

struct Layer {
  const u16 *norm, *q_bias, *k_bias, *v_bias, *mlp_norm;
  u16 *keys, *values;
};
struct alignas(64) Map { u8 opaque[128]; }; // of a matrix, for the copy engine
struct Maps { Map q, k, v, out, gate, up, down, keys, values; }; // of a layer
