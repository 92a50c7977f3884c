// What becomes of a tile of sums: rounded through shared memory, so that it is stored 16 bytes at a
// time, and the statistics of its columns.
#pragma once

#include "conv_tile.cuh"
#include "samples.cuh"

namespace fusedres::cuda {

// 16 bytes of shared memory.
template <class T>
__device__ __forceinline__ Pack<T, kAccessBytes / sizeof(T)> load_chunk(const unsigned char* at) {
  const uint4 bits = load_shared(reinterpret_cast<const uint4*>(at));
  Pack<T, kAccessBytes / sizeof(T)> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}

// The tile in the output's dtype, kM rows of kN values.
template <class Tile>
struct Staging {
  using T = typename Tile::T;
  static constexpr int kRow = Tile::kN * sizeof(T);
  static constexpr int kBytes = Tile::kM * kRow;
  // a pair of floats is two chunks in four rows at a time, one of 16-bit values a chunk in eight
  using Rows = Swizzled<kRow, sizeof(T) / 2>;
  using Pair = std::conditional_t<sizeof(T) == 4, uint2, uint32_t>;

  unsigned char* memory;
  int thread;

  __device__ __forceinline__ Pair* pair(int row, int column) const {
    const int at = column * sizeof(T);
    return reinterpret_cast<Pair*>(memory + Rows::at(row, at / kAccessBytes) + at % kAccessBytes);
  }
  // 16 bytes of each row in turn: chunk(row, column, address)
  template <class F>
  __device__ __forceinline__ void for_each_chunk(F chunk) const {
    constexpr int kChunks = kRow / kAccessBytes;
#pragma unroll 4  // in flight; all at once would take more registers
    for (int i = 0; i < Tile::kM * kChunks / Tile::kThreads; ++i) {
      const int at = thread + i * Tile::kThreads, row = at / kChunks, c = at % kChunks;
      chunk(row, c * Tile::kVector, memory + Rows::at(row, c));
    }
  }
  // the same for those that there are
  template <class F>
  __device__ __forceinline__ void for_each_chunk(int rows, int columns, F chunk) const {
    for_each_chunk([&](int row, int column, unsigned char* at) {
      if (row < rows && column < columns) chunk(row, column, at);
    });
  }
  // Starts copies of a matrix's rows to where theirs are here; zeros for what isn't there.
  __device__ __forceinline__ void copy_rows(const T* from, int64_t pitch, int rows,
                                            int columns) const {
    for_each_chunk([&](int row, int column, unsigned char* at) {
      const bool there = row < rows && column < columns;
      copy_async(at, from + (there ? row * pitch + column : 0), there);
    });
  }
  // to: the tile's first value in a matrix of rows of `pitch`; after a barrier
  __device__ __forceinline__ void store_rows(T* to, int64_t pitch, int rows, int columns) const {
    for_each_chunk(rows, columns, [&](int row, int column, const unsigned char* at) {
      store(to + row * pitch + column, load_chunk<T>(at));
    });
  }
};

// Two neighbours, rounded and widened again.
template <class T>
__device__ __forceinline__ void round_pair(float& a, float& b) {
  if constexpr (sizeof(T) == 2) {
    const auto pair = Convert<T>::narrow(a, b);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    const float2 two = Convert<T>::widen(bits);
    a = two.x;
    b = two.y;
  }
}
template <class T>
__device__ __forceinline__ auto bits_of_pair(float a, float b) {
  if constexpr (sizeof(T) == 4) {
    return uint2{bits_of_float(a), bits_of_float(b)};
  } else {
    const float two[2] = {a, b};
    return Values<T>::narrow(two);
  }
}

template <class T>
__device__ __forceinline__ float2 pair_of_bits(typename Word<2 * sizeof(T)>::type bits) {
  if constexpr (sizeof(T) == 4) {
    return {float_of_bits(bits.x), float_of_bits(bits.y)};
  } else {
    return Convert<T>::widen(bits);
  }
}

// Calls f(row, column, a, b) for each pair of neighbouring sums of a thread, column by column: a
// and b are references, row and column of the tile.
template <class Tile, class F>
__device__ __forceinline__ void for_each_pair(const Stand<Tile>& stand, Accumulators<Tile>& sums,
                                              F f) {
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsN; ++j) {
    const int column = stand.first_column + 8 * j + 2 * stand.member;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = stand.first_row + 16 * i + stand.group + 8 * below;
        f(row, column, sums[i][j][2 * below], sums[i][j][2 * below + 1]);
      }
    }
  }
}

// Halves the columns that a lane has: gives one half of them to the lane whose number differs in
// bit `lanes`, and merges that one's samples of the other half into its own, of n rows, to which
// come those of the other's share.
template <int kHalf, int N, class From>
__device__ __forceinline__ void halve(Sample (&samples)[N], From from, bool upper, int lanes,
                                      float n, float share) {
  const auto pick = [](bool first, Sample a, Sample b) {
    return Sample{first ? a.mean : b.mean, first ? a.m2 : b.m2};
  };
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const Sample lower_half = from(k), upper_half = from(k + kHalf);
    const Sample gives = pick(upper, lower_half, upper_half);
    const Sample keeps = pick(upper, upper_half, lower_half);
    const Sample gets = {__shfl_xor_sync(0xffffffffu, gives.mean, lanes),
                         __shfl_xor_sync(0xffffffffu, gives.m2, lanes)};
    samples[k] = merge(keeps, gets, n, share);
  }
}

// Mean and squared deviations of the columns of a tile, over the rows that exist(row) says;
// samples: kWarpsM rows of kN in shared memory, which have to be merged after a barrier.
template <class Tile, class Exist>
__device__ __forceinline__ void put_samples(Sample* samples, const Stand<Tile>& stand,
                                            const Accumulators<Tile>& sums, const Exist& exist) {
  constexpr int N = 2 * Tile::kFragmentsN;
  bool there[Tile::kFragmentsM][2];
  float count = 0.0f;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      there[i][below] = exist(stand.first_row + 16 * i + stand.group + 8 * below);
      count += there[i][below];
    }
  }
  const float each = count > 0.0f ? 1.0f / count : 0.0f;
  const auto sample_of_column = [&](int k) {
    const auto value = [&](int i, int below) { return sums[i][k / 2][2 * below + k % 2]; };
    float sum = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kFragmentsM; ++i) {
      if (there[i / 2][i % 2]) sum += value(i / 2, i % 2);
    }
    const float mean = sum * each;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kFragmentsM; ++i) {
      const float deviation = there[i / 2][i % 2] ? value(i / 2, i % 2) - mean : 0.0f;
      m2 = fmaf(deviation, deviation, m2);
    }
    return Sample{mean, m2};
  };
  Sample mine[N / 2];
  // the eight lanes of a member end with different columns: those of group g with the g-th eighth
  const auto halved = [&](auto half, auto from, int lanes) {
    const float other = __shfl_xor_sync(0xffffffffu, count, lanes);
    const float share = other > 0.0f ? divide(other, count + other) : 0.0f;
    halve<half.value>(mine, from, (stand.lane & lanes) != 0, lanes, count, share);
    count += other;
  };
  const auto own = [&](int k) { return mine[k]; };
  halved(std::integral_constant<int, N / 2>{}, sample_of_column, 16);
  halved(std::integral_constant<int, N / 4>{}, own, 8);
  halved(std::integral_constant<int, N / 8>{}, own, 4);
  // an eighth: one column, or two neighbours, which are stored together for the banks' sake
  constexpr int kOwn = N / 8;
  static_assert(kOwn == 1 || kOwn == 2);
  const int at = stand.group * kOwn;
  const int column = stand.first_column + at / 2 * 8 + 2 * stand.member + at % 2;
  Sample* const to = samples + stand.warp_m * Tile::kN + column;
  if constexpr (kOwn == 1) {
    store_shared(to, mine[0]);
  } else {
    store_shared(reinterpret_cast<float4*>(to),
                 float4{mine[0].mean, mine[0].m2, mine[1].mean, mine[1].m2});
  }
}

// Takes the samples of a column of the tile into those of the tiles before, of n rows;
// exist_before(row): of the tile's rows before this one.
template <class Tile, class ExistBefore>
__device__ __forceinline__ void take_samples(Sample& mine, float& n, const Sample* samples,
                                             int column, const ExistBefore& exist_before) {
  constexpr int kRows = Tile::kM / Tile::kWarpsM;
#pragma unroll
  for (int warp = 0; warp < Tile::kWarpsM; ++warp) {
    const int some = exist_before((warp + 1) * kRows) - exist_before(warp * kRows);
    if (some == 0) break;
    const float more = static_cast<float>(some);
    mine = merge(mine, load_shared(samples + warp * Tile::kN + column), n, divide(more, n + more));
    n += more;
  }
}

}  // namespace fusedres::cuda
