// Per-channel statistics in one pass over memory: x -> mean, biased variance, rstd, scale, shift.
//
// A tile of values is held in registers, its sum and its squared deviations from its own mean (M2)
// are taken there, and tiles are merged by Chan's formula, so nothing cancels as in E[x^2] -
// E[x]^2. Values are taken relative to a pivot, the channel's first value, which keeps float32 sums
// exact enough where the mean is large against the deviation.
#include <cmath>

#include "ops.h"
#include "parallel.h"

namespace fusedres::cpu::FUSEDRES_ISA {
namespace {

constexpr int kTile = Vec::width == 16 ? 16 : 8;  // vectors of a tile, held in registers

template <class T>
inline float value(const T* p) {
  float lanes[Vec::width];
  store(lanes, load(p, First{1}));
  return lanes[0];
}

// Sums and M2 of n values merged with those of m more, for any kind of number that has + - *.
template <class Number>
struct Moments {
  Number sum, m2;

  // by Chan, Golub and LeVeque: M2 = M2a + M2b + (mean_b - mean_a)^2 * n m / (n + m)
  static Moments merge(Moments a, Moments b, Number inverse_n, Number inverse_m, Number weight) {
    const Number delta = b.sum * inverse_m - a.sum * inverse_n;
    return {a.sum + b.sum, a.m2 + b.m2 + delta * delta * weight};
  }
};

inline float merge_weight(int64_t n, int64_t m) {
  return static_cast<float>(static_cast<double>(n) * m / static_cast<double>(n + m));
}

// Merges partial moments, chunk by chunk in their order, in double.
struct Total {
  int64_t channels, n = 0;
  Buffer<double> sum = buffer<double>(channels), m2 = buffer<double>(channels);

  // partial[c * stride] holds the sum of m values of channel c, partial[c * stride + to_m2] their
  // M2
  void add(const float* partial, int64_t stride, int64_t to_m2, int64_t m) {
    const double inverse_n = n ? 1.0 / n : 0, inverse_m = 1.0 / m;
    const double weight = static_cast<double>(n) * m / (n + m);
    for (int64_t c = 0; c < channels; ++c) {
      const Moments<double> more{partial[c * stride], partial[c * stride + to_m2]};
      const Moments<double> all =
          n ? Moments<double>::merge({sum[c], m2[c]}, more, inverse_n, inverse_m, weight) : more;
      sum[c] = all.sum;
      m2[c] = all.m2;
    }
    n += m;
  }

  void write(const float* pivot, float* mean, float* var) const {
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = static_cast<float>(pivot[c] + sum[c] / n);
      var[c] = static_cast<float>(m2[c] / n);
    }
  }
};

// The channels' first values; first(c) points at channel c's.
template <class F>
inline void pivots(int64_t channels, float* pivot, F first) {
  for (int64_t c = 0; c < channels; ++c) {
    const float v = value(first(c));
    pivot[c] = std::isfinite(v) ? v : 0.0f;
  }
}

template <class T>
void stats_rows(Shape s, const T* x, float* mean, float* var, int threads) {
  const Chunks chunks = Chunks::of_rows(s);
  const Buffer<float> memory = buffer<float>((1 + chunks.number * 2) * s.c);
  float* pivot = memory.get();
  float* partial = pivot + s.c;  // [chunk][sum, m2][C]
  pivots(s.c, pivot, [=](int64_t c) { return x + c; });
  parallel_for(chunks.number, threads, [=](int64_t chunk) {
    float* sums = partial + chunk * 2 * s.c;
    float* m2s = sums + s.c;
    const int64_t begin = chunks.begin(chunk);
    for_each_group<kTile>(begin, chunks.end(chunk), [=](int64_t row, auto rows) {
      constexpr int m = decltype(rows)::value;
      const int64_t n = row - begin;
      const Vec inverse_n = set(n ? 1.0f / n : 0.0f), inverse_m = set(1.0f / m);
      const Vec weight = set(n ? merge_weight(n, m) : 0.0f);
      for_each_vector(s.c, [&](int64_t c, auto lanes) {
        const Vec p = load(pivot + c, lanes);
        Vec d[m];
        for (int r = 0; r < m; ++r) d[r] = load(x + (row + r) * s.c + c, lanes) - p;
        Moments<Vec> tile{d[0], set(0.0f)};
        for (int r = 1; r < m; ++r) tile.sum = tile.sum + d[r];
        const Vec centre = tile.sum * inverse_m;
        for (int r = 0; r < m; ++r) tile.m2 = fma(d[r] - centre, d[r] - centre, tile.m2);
        if (n) {
          const Moments<Vec> before{load(sums + c, lanes), load(m2s + c, lanes)};
          tile = Moments<Vec>::merge(before, tile, inverse_n, inverse_m, weight);
        }
        store(sums + c, tile.sum, lanes);
        store(m2s + c, tile.m2, lanes);
      });
    });
  });
  Total total{s.c};
  for (int64_t k = 0; k < chunks.number; ++k) {
    total.add(partial + k * 2 * s.c, 1, s.c, chunks.end(k) - chunks.begin(k));
  }
  total.write(pivot, mean, var);
}

template <class T>
void stats_planes(Shape s, const T* x, float* mean, float* var, int threads) {
  const Buffer<float> memory = buffer<float>((1 + s.n * 2) * s.c);
  float* pivot = memory.get();
  float* partial = pivot + s.c;  // [N, C][sum, m2]
  pivots(s.c, pivot, [=](int64_t c) { return x + c * s.hw; });
  parallel_for(s.n * s.c, threads, [=](int64_t plane) {
    const T* values = x + plane * s.hw;
    const Vec p = set(pivot[plane % s.c]);
    Moments<float> total{0, 0};
    for (int64_t begin = 0; begin < s.hw; begin += kTile * Vec::width) {
      const int64_t left = s.hw - begin;
      const int64_t m = left < kTile * Vec::width ? left : kTile * Vec::width;
      Vec d[kTile];
      Vec tile_sum = set(0.0f), tile_m2 = set(0.0f);
      for_each_vector(m, [&](int64_t i, auto lanes) {
        d[i / Vec::width] = load(values + begin + i, lanes) - p;
        tile_sum = tile_sum + zero_beyond(d[i / Vec::width], lanes);
      });
      Moments<float> tile{sum(tile_sum), 0};
      const Vec centre = set(tile.sum / m);
      for_each_vector(m, [&](int64_t i, auto lanes) {
        const Vec deviation = zero_beyond(d[i / Vec::width] - centre, lanes);
        tile_m2 = fma(deviation, deviation, tile_m2);
      });
      tile.m2 = sum(tile_m2);
      total = begin == 0 ? tile
                         : Moments<float>::merge(total, tile, 1.0f / begin, 1.0f / m,
                                                 merge_weight(begin, m));
    }
    partial[plane * 2] = total.sum;
    partial[plane * 2 + 1] = total.m2;
  });
  Total merged{s.c};
  for (int64_t n = 0; n < s.n; ++n) merged.add(partial + n * s.c * 2, 2, 1, s.hw);
  merged.write(pivot, mean, var);
}

}  // namespace

void bn_stats(DType dtype, Shape s, const void* x, const float* weight, const float* bias,
              double eps, float* stats, int threads) {
  float* mean = stats + kMean * s.c;
  float* var = stats + kVar * s.c;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    (s.planes ? stats_planes<T> : stats_rows<T>)(s, static_cast<const T*>(x), mean, var, threads);
  });
  bn_finalize(s.c, mean, var, weight, bias, eps, stats);
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
