// The stem's convolution, 7x7 with stride 2 and padding 3 on the three channels of an image, as
// matrix products without an im2col.
//
// Pixels lie in shared memory with a fourth channel and a border of zeros, as they do in `pixels`
// (fusedres/kernels/rows.py). A row of the window of output column q is then the eight pixels from
// 2q on, so that in 16 bits the windows of neighbouring columns are 16 bytes apart: eight of them
// are eight different chunks of the banks, and ldmatrix reads operands where the pixels are. The
// first of the eight pixels and the fourth channel meet weights of 0.
#pragma once

#include "conv_epilogue.cuh"
#include "ops.h"

namespace fusedres::cuda {

constexpr int kStemChannels = 3, kStemSide = 7, kStemBorder = 3;
constexpr int kPixel = 4;                           // values
constexpr int kWindowPixels = 8;                    // of a row of the window
constexpr int kWindowRow = kWindowPixels * kPixel;  // values
constexpr int kWindow = kStemSide * kWindowRow;
constexpr int kStemColumns = 16;  // of the output, in a tile: a fragment's rows

// Output positions and pixels can be counted by an int.
struct StemShape {
  int n, height, width, filters;
  __host__ __device__ int out_height() const { return (height - 1) / 2 + 1; }
  __host__ __device__ int out_width() const { return (width - 1) / 2 + 1; }
  __host__ __device__ int packed_height() const { return 2 * out_height() + kStemSide - 2; }
  __host__ __device__ int packed_width() const { return 2 * out_width() + kStemSide - 1; }
};

// Tiles of an image, kHeight by kWidth of something.
template <int kHeight, int kWidth>
struct Tiling {
  int images, height, width;
  __host__ __device__ int down() const { return (height + kHeight - 1) / kHeight; }
  __host__ __device__ int across() const { return (width + kWidth - 1) / kWidth; }
  __host__ __device__ int tiles() const { return images * down() * across(); }
  // its image, and where it begins there
  struct Place {
    int image, row, column;
  };
  __device__ __forceinline__ Place place(int tile) const {
    const int line = tile / across(), image = line / down();
    return {image, (line - image * down()) * kHeight, (tile - line * across()) * kWidth};
  }
};

// A tile of the output, kRows by kStemColumns positions by 128 bytes of filters; a warp has two
// rows and all filters. Named as a ConvTile's, whose epilogue it has.
template <class T_, int kRows_>
struct StemTile {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kM = kRows * kStemColumns, kN = 128 / sizeof(T);
  static constexpr int kWarpsM = kRows / 2, kWarpsN = 1, kBlocks = 32 / kRows;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kVector = kAccessBytes / sizeof(T);
  static constexpr int kFragmentsM = kM / kWarpsM / 16, kFragmentsN = kN / kWarpsN / 8;
  using Tiles = Tiling<kRows, kStemColumns>;
};

// The pixels that the windows of kRows by kStemColumns positions see. A float32 pixel is a chunk:
// even and odd ones are kept apart, so that neighbouring windows are 16 bytes apart there, too.
template <class T, int kRows>
struct StemPixels {
  static constexpr int kOfChunk = kAccessBytes / (kPixel * sizeof(T));  // pixels
  static constexpr int kHeight = 2 * kRows + kStemSide - 2;
  static constexpr int kWidth = 2 * kStemColumns + kWindowPixels - 2;
  static constexpr int kChunks = kWidth / kOfChunk;  // of a row
  // bytes from even pixels to odd ones: half a line of banks, so that two of each can be read at
  // once
  static constexpr int kOdd = 320;
  // of a row; the next one goes on where its chunks would
  static constexpr int kPitch = kOfChunk == 2 ? kChunks * kAccessBytes : 688;
  static constexpr int kBytes = kHeight * kPitch;
  static_assert(kOfChunk == 2 || (kChunks / 2 * kAccessBytes <= kOdd && kOdd % 128 == 64 &&
                                  kOdd + kChunks / 2 * kAccessBytes <= kPitch &&
                                  (kPitch - kChunks / 2 * kAccessBytes) % 128 == 0));

  // bytes from the start to a chunk; to that of the next column's window it is one of 16 bytes more
  static __device__ __forceinline__ constexpr int at(int row, int chunk) {
    return row * kPitch +
           (kOfChunk == 2 ? chunk * kAccessBytes : chunk % 2 * kOdd + chunk / 2 * kAccessBytes);
  }
};

// A value of any type, widened.
template <class X>
__device__ __forceinline__ float load_wide(const X* p) {
  const X value = load(p).v[0];
  if constexpr (std::is_same_v<X, uint8_t>) {
    return static_cast<float>(value);
  } else {
    return Convert<X>::widen(value);
  }
}

// Calls f with a null pointer of the type.
template <class F>
__device__ __forceinline__ void with_value_type(Value type, F f) {
  switch (type) {
    case Value::float32:
      return f(static_cast<const float*>(nullptr));
    case Value::bfloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    case Value::float16:
      return f(static_cast<const __half*>(nullptr));
    case Value::uint8:
      return f(static_cast<const uint8_t*>(nullptr));
  }
}

// Brings the pixels from row and column of a packed image on into shared memory; the column is
// even. keep(row, column) says which of them go to `packed` as well, if it is there.
template <class T, int kRows, int kThreadsOfBlock, class Keep>
__device__ __forceinline__ void put_pixels(unsigned char* to, const StemImage& x, int image,
                                           int row, int column, T* packed, const StemShape& s,
                                           const Keep& keep) {
  using Pixels = StemPixels<T, kRows>;
  constexpr int kChunks = Pixels::kHeight * Pixels::kChunks;
  constexpr int kOfChunk = Pixels::kOfChunk;
  constexpr int kEach = (kChunks + kThreadsOfBlock - 1) / kThreadsOfBlock;
  const int thread = right_here(threadIdx.x);
  const auto stride = [&](int i) { return static_cast<int>(x.values.stride[i]); };
  with_value_type(x.values.type, [&](auto* null) {
    using X = std::remove_pointer_t<decltype(null)>;
    const X* const from = static_cast<const X*>(x.values.data) + image * x.values.stride[0];
    // all on their way before the first is looked at
    float values[kEach][kOfChunk][kStemChannels];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int chunk = thread + i * kThreadsOfBlock;
      const int h = row + chunk / Pixels::kChunks - kStemBorder;
      const bool in_row = chunk < kChunks && h >= 0 && h < s.height;
#pragma unroll
      for (int k = 0; k < kOfChunk; ++k) {
        const int w = column + chunk % Pixels::kChunks * kOfChunk + k - kStemBorder - 1;
        const bool there = in_row && w >= 0 && w < s.width;
        const int at = there ? h * stride(2) + w * stride(3) : 0;
#pragma unroll
        for (int c = 0; c < kStemChannels; ++c) {
          values[i][k][c] = there ? load_wide(from + (at + c * stride(1))) : x.mean[c];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int chunk = thread + i * kThreadsOfBlock;
      if (chunk >= kChunks) break;
      Pack<float, kOfChunk * kPixel> wide = {};
#pragma unroll
      for (int k = 0; k < kOfChunk; ++k) {
#pragma unroll
        for (int c = 0; c < kStemChannels; ++c) {
          wide.v[k * kPixel + c] = (values[i][k][c] - x.mean[c]) * x.rstd[c];
        }
      }
      const auto pack = narrow<T>(wide);
      uint4 bits;
      memcpy(&bits, &pack, sizeof bits);
      const int down = chunk / Pixels::kChunks, right = chunk % Pixels::kChunks;
      store_shared(reinterpret_cast<uint4*>(to + Pixels::at(down, right)), bits);
      if (packed == nullptr || !keep(down, right * kOfChunk)) continue;
      const int64_t line = static_cast<int64_t>(image) * s.packed_height() + row + down;
      store(packed + (line * s.packed_width() + column + right * kOfChunk) * kPixel, pack);
    }
  });
}

// The filters of a tile, rows of a window and what keeps eight of them in different banks.
template <class Tile>
struct StemFilters {
  using T = typename Tile::T;
  static constexpr int kPitch = kWindow * sizeof(T) + kAccessBytes;
  static constexpr int kBytes = Tile::kN * kPitch;
  static_assert(kPitch / kAccessBytes % 2 == 1);

  // Rounds them, from `filter` on, into shared memory; zeros for those that there aren't.
  static __device__ __forceinline__ void put(unsigned char* to, const Strided& weight, int filter,
                                             const StemShape& s) {
    constexpr int kChunks = kWindow * sizeof(T) / kAccessBytes, kVector = Tile::kVector;
    with_value_type(weight.type, [&](auto* null) {
      using X = std::remove_pointer_t<decltype(null)>;
#pragma unroll 2
      for (int i = threadIdx.x; i < Tile::kN * kChunks; i += Tile::kThreads) {
        const int k = i / kChunks, first = i % kChunks * kVector;  // value of the window
        const X* const from = static_cast<const X*>(weight.data) + (filter + k) * weight.stride[0] +
                              first / kWindowRow * weight.stride[2];
        Pack<float, kVector> wide = {};
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const int c = v % kPixel, column = (first + v) % kWindowRow / kPixel - 1;
          if (c < kStemChannels && column >= 0 && filter + k < s.filters) {
            wide.v[v] = load_wide(from + c * weight.stride[1] + column * weight.stride[3]);
          }
        }
        const auto pack = narrow<T>(wide);
        uint4 bits;
        memcpy(&bits, &pack, sizeof bits);
        store_shared(reinterpret_cast<uint4*>(to + k * kPitch + i % kChunks * kAccessBytes), bits);
      }
    });
  }
};

// The tile's bias in shared memory, zeros where there is none.
template <class Tile>
__device__ __forceinline__ void put_bias(float* to, const float* bias, int filter,
                                         const StemShape& s) {
  for (int k = threadIdx.x; k < Tile::kN; k += Tile::kThreads) {
    store_shared(to + k,
                 bias != nullptr && filter + k < s.filters ? load(bias + filter + k).v[0] : 0.0f);
  }
}

// Multiplies the windows of a tile's positions by its filters, and adds its bias.
template <class Tile>
__device__ __forceinline__ void multiply_windows(Accumulators<Tile>& sums,
                                                 const unsigned char* pixels,
                                                 const unsigned char* filters, const float* bias) {
  using T = typename Tile::T;
  using Pixels = StemPixels<T, Tile::kRows>;
  constexpr int kPitch = StemFilters<Tile>::kPitch;
  constexpr int kSteps = kWindowRow * sizeof(T) / kStepBytes;  // of a row of the window
  const Stand<Tile> stand;
  const unsigned char* const a_from =
      pixels + Pixels::at(2 * stand.first_row / kStemColumns, stand.a_chunk()) +
      stand.a_row() * kAccessBytes;
  const unsigned char* const b_from =
      filters + stand.b_column() * kPitch + stand.b_chunk() * kAccessBytes;
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsN; ++j) {
    const float2 two = load_shared(reinterpret_cast<const float2*>(bias + 8 * j) + stand.member);
#pragma unroll
    for (int i = 0; i < 2 * Tile::kFragmentsM; ++i) {
      sums[i / 2][j][i % 2 * 2] = two.x;
      sums[i / 2][j][i % 2 * 2 + 1] = two.y;
    }
  }
#pragma unroll 1
  for (int r = 0; r < kStemSide; ++r) {
    const unsigned char* const a_row = a_from + r * Pixels::kPitch;
    const unsigned char* const b_row = b_from + r * kSteps * kStepBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[Tile::kFragmentsN][2];
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        uint32_t two[4];
        load_matrices(two, b_row + 8 * j * kPitch + step * kStepBytes);
        as_operand<T>(two);
        b[j][0] = two[0];
        b[j][1] = two[1];
        b[j + 1][0] = two[2];
        b[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
        uint32_t a[4];
        load_matrices(a, a_row + Pixels::at(2 * i, 2 * step));
        as_operand<T>(a);
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) mma<T>(sums[i][j], a, b[j]);
      }
    }
  }
}

// Shared memory: the pixels, then the tile of the output in the same place; filters; bias; samples.
template <class Tile>
struct StemMemory {
  static constexpr int kPixels = StemPixels<typename Tile::T, Tile::kRows>::kBytes;
  static constexpr int kFilters = kPixels > Staging<Tile>::kBytes ? kPixels : Staging<Tile>::kBytes;
  static constexpr int kBias = kFilters + StemFilters<Tile>::kBytes;
  static constexpr int kSamples = kBias + Tile::kN * sizeof(float);
  static constexpr int kBytes = kSamples + Tile::kWarpsM * Tile::kN * sizeof(Sample);
};

}  // namespace fusedres::cuda
