// The contract between the kernels and their callers: argument structs and the kernel table.
//
// Kernels allocate nothing, start no thread and know nothing of torch. They expect the IEEE state
// of float_env.h in the calling thread.
#pragma once

#include <stdint.h>

namespace dynquant {

enum class Dtype : int32_t { f32, bf16, f16, i32, i8 };

constexpr int64_t bytes_of(Dtype dtype) {
  if (dtype == Dtype::i8) return 1;
  return dtype == Dtype::bf16 || dtype == Dtype::f16 ? 2 : 4;
}

// What a run of activation values spans. `lo` <= 0 <= `hi`; `has_nan` covers NaN alone, an infinity
// shows in `lo` or `hi`.
struct Range {
  float lo;
  float hi;
  bool has_nan;
};

// How values become integers: q = clamp(rint(x * factor) + zero_point, q_min, q_max) + shift, or
// x / factor in place of the product. 16-bit ones come out as two bytes, each kind in memory of its
// own.
struct QuantizeArgs {
  const void* x;
  Dtype dtype;
  int64_t k;
  float factor;
  int32_t zero_point;
  int32_t q_min;
  int32_t q_max;
  int32_t shift;
  uint8_t* q;                   // where q has 16 bits: its high bytes
  uint8_t* low;                 // the low bytes; null where q has 8 bits
  const void* ahead = nullptr;  // as many values, which are quantized next; only a hint
};

// Vectors of k values, each quantized to 8 bits by its own range, as plain bytes.
struct QuantizeVectorsArgs {
  const void* x;
  Dtype dtype;
  int64_t count;
  int64_t x_stride;  // elements between vectors
  int64_t k;
  int64_t
      ahead;  // bytes from a vector to one of a later call, which is fetched; anything may be there
  bool symmetric;
  const Range* range;  // of each, where they are known, or null
  uint8_t* q;
  int64_t q_stride;  // bytes between vectors
  float* scale;
  int32_t* zero_point;   // null where symmetric
  int64_t value_stride;  // between the vectors' scales, and their zero points
};

// From the int32 sums to the output: y = (float(acc) * scale[m]) * weight_scale[n] + bias[n].
// Dtype::i32 stores the corrected sums themselves and reads neither scale nor bias.
struct EpilogueArgs {
  const float* scale;         // one for each row
  const float* weight_scale;  // one for each column, or a single one
  bool per_channel;
  const float* bias;  // one for each column, or null
  void* out;
  Dtype out_dtype;
  int64_t out_stride;  // elements between rows
};

// What products leave set up in their thread for the next ones. All zeros: nothing. Whoever keeps
// it calls `release`, where there is one, after the last of them, and runs nothing else before that
// could set up the same unit. A product that finds what one of another set has set up releases it.
struct UnitState {
  int64_t configured;  // the product's own note
  void (*release)();
};

// Rows of staged activations (unsigned bytes in the order that the instruction set reads) times the
// columns [n_begin, n_end) of a packed weight. n_begin is a multiple of the panel's width.
// The rows lie as the product's StagedLayout says; the first is the first of a tile.
//
// Activations in 16 bits are pairs of rows, the high bytes and then the low ones, that give one row
// of float output: 256 * float(high sum) + float(low sum) takes the place of float(acc).
struct GemmArgs {
  const uint8_t* staged;
  int64_t staged_stride;      // of the layout
  const int32_t* zero_point;  // one for each row, of the unsigned form
  int64_t m;                  // even where rows come in pairs
  bool pairs;                 // scale then has one value for each pair
  const int8_t* panels;
  int64_t groups;
  int64_t n_begin;
  int64_t n_end;
  EpilogueArgs epilogue;  // column pointers and `out` start at column 0
  UnitState* unit;        // of the calling thread; null: the product leaves nothing set up
  const int8_t* next;     // what the thread reads after the panels, or null; only a hint
  bool is_far;            // the panels come from memory; only a hint
};

// acc[m, n] -> out, by the same epilogue.
struct RescaleArgs {
  const int32_t* acc;
  int64_t acc_stride;
  int64_t m;
  int64_t n;
  EpilogueArgs epilogue;
};

// fp32 rows times the rows [n_begin, n_end) of a weight in bf16, fp16, fp32 or int8, plus bias:
// out[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n], in fp32, then rounded to out_dtype.
// half.inl.h says in which order.
struct HalfGemmArgs {
  const float* x;
  int64_t x_stride;  // elements between rows, as for weight and out
  int64_t m;
  const void* weight;
  Dtype weight_dtype;
  int64_t weight_stride;
  int64_t k;
  int64_t n_begin;
  int64_t n_end;
  const float* bias;  // one for each row of the weight, or null
  void* out;          // starts at column 0
  Dtype out_dtype;    // f32, bf16 or f16
  int64_t out_stride;
};

enum class BagMode : int32_t { sum, mean, max };

// Bags [begin, end) over the rows of a quantized table: embedding.inl.h says how a row is held.
// Bag b takes the indices [offsets[b], offsets[b + 1]), or where offsets is null the bag_size ones
// from b * bag_size. Every index lies in the table. A bag without indices gives zeros.
struct BagArgs {
  const uint8_t* rows;
  int64_t row_bytes;
  int bits;              // 8 or 4
  const float* qparams;  // scale and offset of each row
  int64_t dim;
  const void* indices;
  bool wide_indices;  // int64, else int32
  int64_t count;      // of all indices
  const int64_t* offsets;
  int64_t bag_size;
  const float* per_sample_weights;  // one for each index, or null
  int64_t padding_idx;              // an index that is left out, or -1
  BagMode mode;
  int64_t begin;
  int64_t end;
  void* out;        // [bags, dim]
  Dtype out_dtype;  // f32, bf16 or f16
};

// The numbers are those of the op `activation`.
enum class Activation : int32_t {
  none,
  gelu,
  gelu_tanh,
  silu,
  relu,
  quick_gelu,
  sigmoid,
  tanh,
  relu_squared
};
constexpr int kActivations = 9;

// y = function(x), and where there is one times `by`; each of the two is rounded to dtype. y may be
// x or by.
struct ActivateArgs {
  Activation function;
  Dtype dtype;  // of x, by and y: f32, bf16 or f16
  const void* x;
  const void* by;
  int64_t n;
  void* y;
};

// The numbers are those of the ops' norm arguments. rms_plus_one multiplies by 1 + weight.
enum class Norm : int32_t { none, layer, rms, rms_plus_one };

// A row's residual is added first, rounded to dtype, and what is then normalized is that. y may be
// x or residual. Strides are bytes between rows.
struct NormArgs {
  Norm norm;
  Dtype dtype;  // of x, residual and y: f32, bf16 or f16
  const void* x;
  const void* residual;  // or null
  int64_t n;
  const float* weight;  // [n], or null
  const float* bias;    // [n], or null; only layer has one
  float eps;
  void* y;
  int64_t rows = 1;
  int64_t x_stride = 0, residual_stride = 0, y_stride = 0;
};

// y = exp(x - max x) / sum; y may be x.
struct SoftmaxArgs {
  Dtype dtype;
  const void* x;
  int64_t n;
  void* y;
};

// The first n values of a row turned by pairs (i, i + n / 2): x * cos + (-x[n / 2 ..], x[.. n / 2])
// * sin. Interleaved, by pairs (i, i + 1), where sin is negated at even places: x * cos + (x[1],
// x[0], x[3], x[2], ..) * sin. y may be x.
struct RotaryArgs {
  Dtype dtype;
  const void* x;
  int64_t n;         // even
  const float* cos;  // [n]
  const float* sin;  // [n]
  void* y;
  bool interleaved = false;
};

// Rows of attention scores, in place: s * scale, plus what is added, becomes p = exp(s - max s),
// and that times value_scale. A sink is one more score of each row, which nothing is added to and
// which counts in the maximum and the sum alone. `scores` and `added` may be read up to a multiple
// of kPartials, and `scores` is written up to there.
constexpr int64_t kPartials = 16;  // partial sums of every sum over a row
struct ScoresArgs {
  float* scores;
  int64_t n;  // positive
  float scale;
  const float* added[2];     // for each row [n], or null
  int64_t added_stride[2];   // values between rows; 0 where rows share them
  const float* value_scale;  // [n], or null
  const float* sink;         // the same of all rows, or null
  float* sum;                // of each row's p; 1 where all are 0
  Range* range;              // of what each row holds at the end
  int64_t rows;
  int64_t stride;  // values between rows
};

// y = x / by, rounded to dtype.
struct DivideArgs {
  const float* x;
  int64_t n;
  const float* by;  // one for each row
  Dtype dtype;
  void* y;
  int64_t rows;
  int64_t x_stride;  // values between rows
  int64_t y_stride;  // bytes
};

// How many heads are read side by side where their vectors come from memory. From a cache, a call
// for each is faster.
constexpr int heads_together(int64_t dim) { return dim <= 64 ? 4 : dim <= 128 ? 2 : 1; }

// out[h][r] = the sum of weights[h][r][j] * vectors[h][j] over n vectors of dim values. Each output
// is a sum of partial sums like those of HalfGemmArgs, of which partial j takes vectors j,
// j + kPartials, ...
struct WeightedSumsArgs {
  const float* weights;   // [heads, rows, n]
  int64_t weight_stride;  // between rows
  int64_t rows;
  const void* vectors;  // [heads, n, dim]
  Dtype dtype;
  int64_t vector_stride;  // in values
  int64_t n;
  int64_t dim;
  float* out;  // [heads, rows, dim]
  int64_t out_stride;
  int64_t heads = 1;
  int64_t head_stride = 0;  // from the vectors of a head to those of the next, in values
};

// A weight W[n, k] laid out for the next product (strips.inl.h), [k, kStripColumns] for so many of
// its rows, zeros for those behind the last one. Strides are in values; one of them is 1.
constexpr int64_t kStripColumns = 32, kStripGaps = 15;
// Rows between the k of a partial sum and those of the next: without, a power of two would bring 16
// places that are written in turn into few cache sets. So few rows lie near each other anyway.
constexpr int64_t strip_gap_of(int64_t k) { return k < 512 ? 0 : 1; }
constexpr int64_t strip_rows_of(int64_t k) { return k + kStripGaps * strip_gap_of(k); }
struct LayStripsArgs {
  const void* weight;
  Dtype dtype;  // f32, bf16, f16 or i8
  int64_t n_stride;
  int64_t k_stride;
  int64_t n;
  int64_t k;
  float* strips;
};

// Rows x[m, k] in fp32, their values in the order in which such a weight has its k.
struct OrderRowsArgs {
  const void* x;
  Dtype dtype;       // f32, bf16 or f16
  int64_t x_stride;  // in values
  int64_t m;
  int64_t k;
  float* rows;
  int64_t stride;
};

// out = x times the first k of such a weight. Sums are those of HalfGemmArgs. Whole strips are
// written.
struct StripsGemmArgs {
  const float* x;  // [m, k]
  int64_t x_stride;
  bool x_is_ordered;  // by OrderRowsArgs
  int64_t m;
  int64_t k;
  const float* strips;
  int64_t laid_k;
  int64_t n;
  float* out;
  int64_t out_stride;  // at least n, filled up to whole strips
};

// int8 rows [n, k] packed as the weight [k, n] that is their transpose, whose panels have no column
// sums: zeros stand there.
struct PackTransposedArgs {
  const int8_t* rows;
  int64_t stride;  // bytes between rows
  int64_t n;
  int64_t k;
  int8_t* panels;
};

// Sums of such a product become its outputs: bias is added, and they are rounded to out_dtype.
struct FinishHalfArgs {
  const float* sums;
  int64_t stride;
  int64_t m;
  int64_t n;
  const float* bias;  // one for each column, or null
  void* out;
  Dtype out_dtype;
  int64_t out_stride;  // in values
};

// Tokens of one head of linear attention and columns of its state (delta_rule.inl.h). Strides are
// in values.
constexpr int64_t kDeltaColumns = 32;  // of a state, that best go through tokens together
struct DeltaRuleArgs {
  const float* query;  // [tokens, dim], as key
  const float* key;
  int64_t vector_stride;
  const float* value;  // [tokens, columns]
  int64_t value_stride;
  const float* decay;  // [tokens], as beta
  const float* beta;
  int64_t tokens;
  int64_t dim;
  int64_t columns;
  const float* from;  // the state before them, [dim, columns]
  int64_t from_stride;
  float* state;  // the one after them; may be `from`
  int64_t state_stride;
  float scale;
  float* out;  // [tokens, columns]
  int64_t out_stride;
};

// Tokens of some rows of the state of a state space model (selective_scan.inl.h).
struct SelectiveScanArgs {
  const float* x;       // [tokens, rows]
  const float* dt;      // the same, or [tokens] where rows share them
  bool shares_dt;       // and the skip
  const float* rate;    // [rows, n], or a single one
  bool rate_is_one;     // only where rows share dt
  int64_t rate_stride;  // 0 where rows share it
  const float* b;       // [tokens, n], as c
  const float* c;
  const float* skip;  // [rows] or [1], or null
  int64_t tokens;
  int64_t rows;
  int64_t n;
  const float* from;  // the state before them, [rows, n]
  float* state;       // the one after them; may be `from`
  float* out;         // [tokens, rows]
};

// y[n] = bias + the sum over taps of weight[tap] * x[tap], of n channels each.
struct TapsArgs {
  const float* weight;  // [taps, n]
  const float* const* x;
  const float* bias;  // or null
  int64_t taps;
  int64_t n;
  float* y;
};

enum class Cell : int32_t { lstm, gru, rnn_tanh, rnn_relu };

// The end of a recurrent step of one row, from the products of the input and of the hidden state,
// each [gates * n] in torch's order of gates (lstm: i f g o; gru: r z n; rnn: one).
struct GatesArgs {
  Cell cell;
  const float* input;
  const float* hidden;
  int64_t n;
  float* h;  // [n]; gru reads the state before the step here, all write the one after it
  float* c;  // [n], the same of lstm's cell state; the others have none
};

// What one core takes for the parts of a product, in nanoseconds: by these, work is split over
// threads, and one of a set's products chosen (costs.h).
struct Costs {
  double multiply_add;     // of one row and one weight
  double weight_byte;      // to have one from the L2 or L3 cache, once for each block of rows
  double quantized_value;  // reading, ranging and rounding one activation
  double panel_row;        // the epilogue of one row of one panel
  // As weight_byte, of a weight that outgrows the L2 cache, where products are so fast that few
  // cores should read all of it; else 0.
  double far_weight_byte = 0.0;
};

// How a product reads weights, where that is measured to pay. Where the L1 cache has no room for
// what is fetched ahead, far.inl.h has another way.
struct Reading {
  int panels;         // from memory, that few rows go through side by side (far.inl.h)
  int few_rows;       // at most
  int64_t far_ahead;  // bytes from memory that are fetched ahead in each of those panels, 0: none
  bool near_ahead;    // whether a single row fetches what comes from a cache
};

// How the bytes of staged rows lie. A row is a run of groups of four k, behind which the product
// may keep what belongs to the row. Where tile_rows is 1, it lies on its own. Else tile_rows rows
// share a tile, the rows' next kTileLine bytes one after the other, and a block of them is tile
// after tile, first along k.
struct StagedLayout {
  int64_t group_bytes;  // for four k of one row
  int64_t tile_rows;
};

constexpr int64_t kTileLine = 64;

// A way to multiply staged rows: how it wants them staged, the kernels, and what they cost.
struct Product {
  int64_t row_multiple;  // parts of a product are worth whole multiples of so many rows
  int64_t block_rows;    // about so many wait in their staged form for a pass over panels
  StagedLayout layout;
  Costs costs;
  void (*quantize_staged)(
      const QuantizeArgs&);  // x * factor, staged and filled up to a whole group
  void (*stage)(const uint8_t* q, int64_t k, uint8_t flip, uint8_t* staged);  // staged = q ^ flip
  void (*gemm)(const GemmArgs&);
};

// Filled by name, in table.inl.h.
struct Kernels {
  const char* name;
  Product product;
  const Product* unit_product;  // another, on a unit that first has to be set up; or null
  double unit_start;            // what that takes, in nanoseconds
  Range (*range)(const void* x, Dtype dtype, int64_t k);
  void (*quantize)(const QuantizeArgs&);  // x * factor, plain bytes
  void (*quantize_divide)(
      const QuantizeArgs&);  // x / factor, plain bytes; NaN gives q_min..q_max's 0
  void (*quantize_vectors)(const QuantizeVectorsArgs&);
  void (*rescale)(const RescaleArgs&);
  void (*half_gemm)(const HalfGemmArgs&);
  Costs half_costs;
  void (*widen)(const void* x, Dtype dtype, int64_t k, float* out);   // to fp32
  void (*narrow)(const float* x, int64_t k, Dtype dtype, void* out);  // from fp32
  // One row of a table to 8 or 4 bits, and its scale and offset; false where it holds NaN or Inf or
  // spans more than fp32 can hold.
  bool (*quantize_row)(const void* x, Dtype dtype, int64_t dim, int bits, uint8_t* q,
                       float* qparams);
  void (*bags)(const BagArgs&);
  void (*activate)(const ActivateArgs&);
  void (*gates)(const GatesArgs&);
  void (*delta_rule)(const DeltaRuleArgs&);
  void (*selective_scan)(const SelectiveScanArgs&);
  void (*taps)(const TapsArgs&);
  void (*norm)(const NormArgs&);
  void (*softmax)(const SoftmaxArgs&);
  void (*rotary)(const RotaryArgs&);
  void (*scores)(const ScoresArgs&);
  void (*divide)(const DivideArgs&);
  void (*weighted_sums)(const WeightedSumsArgs&);
  void (*lay_strips)(const LayStripsArgs&);
  void (*order_rows)(const OrderRowsArgs&);
  int64_t ordered_from;  // values of a row from which on that pays
  void (*strips_gemm)(const StripsGemmArgs&);
  int64_t strips_from_k;  // from which K on a weight in 16 bits is laid out where rows are many
  void (*finish_half)(const FinishHalfArgs&);
  void (*pack_transposed)(const PackTransposedArgs&);
  // Gives the panels of a weight [n, k] their column sums; null where the set's products need none
  // of them as long as zero points are 0.
  void (*sum_columns)(int8_t* panels, int64_t n, int64_t k);

  // For benchmarks: what the machine could give at best (probe.inl.h).
  int64_t (*peak)(int64_t steps);
  int32_t (*read)(const void* data, int64_t bytes);
};

}  // namespace dynquant
