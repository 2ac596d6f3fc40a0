#include "distance_bands.h"

#include <algorithm>

#include "../cpu/pack.h"
#include "head_rows.h"

namespace dynquant {
namespace {

int64_t floats(int64_t count) { return count * static_cast<int64_t>(sizeof(float)); }

}  // namespace

int64_t DistanceBands::weight_bytes() const {
  if (integers_) return panels_of(columns()) * panel_bytes(dim_);
  return floats(ceil_div(columns(), kStripColumns) * kStripColumns * strip_rows_of(dim_));
}

int64_t DistanceBands::bytes(int64_t kept) const {
  return Pieces::total({row_bytes(), vector_bytes(), weight_bytes(), floats(row_values()),
                        floats(vector_values()), floats(row_values()),
                        floats(kept * band_values())});
}

void DistanceBands::take(uint8_t* memory, int64_t kept) {
  Pieces pieces(memory);
  rows_ = pieces.next<uint8_t>(row_bytes());
  vectors_ = pieces.next<uint8_t>(vector_bytes());
  weight_ = pieces.next<uint8_t>(weight_bytes());
  row_scale_ = pieces.next<float>(row_values());
  vector_scale_ = pieces.next<float>(vector_values());
  zero_point_ = pieces.next<int32_t>(row_values());
  bands_ = pieces.next<float>(kept * band_values());
}

void DistanceBands::quantize(const char* x, int64_t stride, int64_t count, uint8_t* q, float* scale,
                             int32_t* zero_point) const {
  quantize_rows(kernels_, x, term_.dtype, stride, count, dim_, q, scale, zero_point);
}

void DistanceBands::widen(const char* x, int64_t stride, int64_t count, float* to) const {
  for (int64_t i = 0; i < count; ++i) {
    kernels_.widen(x + i * stride, term_.dtype, dim_, to + i * dim_);
  }
}

void DistanceBands::begin_head(int64_t head) {
  head_ = head;
  const char* first = term_.vectors.at(0, 0, head);
  const int64_t stride = term_.vectors.row_stride, before = columns_before();
  const int64_t skipped = before * dim_;
  std::fill(vectors_, vectors_ + skipped * value_bytes(), uint8_t{0});
  if (!integers_) {
    float* vectors = reinterpret_cast<float*>(vectors_);
    widen(first, stride, columns() - before, vectors + skipped);
    kernels_.lay_strips(
        {vectors, Dtype::f32, dim_, 1, columns(), dim_, reinterpret_cast<float*>(weight_)});
    return;
  }
  std::fill(vector_scale_, vector_scale_ + before, 0.0f);
  quantize(first, stride, columns() - before, vectors_ + skipped, vector_scale_ + before, nullptr);
  int8_t* const packed = reinterpret_cast<int8_t*>(weight_) - kHeaderBytes;
  for (int64_t p = 0; p < panels_of(columns()); ++p) {
    pack_panel(reinterpret_cast<const int8_t*>(vectors_), dim_, columns(), dim_, p, packed);
  }
}

void DistanceBands::begin_sequence(int64_t b) {
  const char* first = term_.rows.at(b, 0, head_);
  if (integers_) {
    quantize(first, term_.rows.row_stride, term_.count, rows_, row_scale_, zero_point_);
  } else {
    widen(first, term_.rows.row_stride, term_.count, reinterpret_cast<float*>(rows_));
  }
}

void DistanceBands::multiply(int64_t band, int64_t kept) const {
  float* const to = bands_ + kept * band_values();
  const int64_t first = band * kRows, m = std::min(kRows, term_.count - first);
  const int64_t column = (count() - 1 - band) * kRows;
  if (!integers_) {
    const float* strips = reinterpret_cast<const float*>(weight_) + column * strip_rows_of(dim_);
    kernels_.strips_gemm({reinterpret_cast<const float*>(rows_) + first * dim_, dim_, false, m,
                          dim_, strips, dim_, width(), to, stride()});
    return;
  }
  const Product& product = product_for(kernels_, m, width(), dim_);
  const ByteRows rows = {rows_ + first * dim_, row_scale_ + first, zero_point_ + first, dim_};
  const int8_t* panels = reinterpret_cast<const int8_t*>(weight_);
  const Packed weight = {panels + column / kPanelColumns * panel_bytes(dim_), width(), dim_};
  EpilogueArgs epilogue = {};
  epilogue.weight_scale = vector_scale_ + column;
  epilogue.per_channel = true;
  epilogue.out = to;
  epilogue.out_dtype = Dtype::f32;
  epilogue.out_stride = stride();
  rows.staged(product, m).multiply(0, m, weight, 0, weight.n, epilogue, false);
}

}  // namespace dynquant
