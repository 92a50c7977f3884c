// The backward of bn_act, in two passes: per-channel sums, then dx.
//
// du is the gradient behind the ReLU. Where a residual went into the ReLU its mask comes from the
// stored output z and du is written, since it is also the residual's gradient. Elsewhere the mask
// is computed again from x with the forward's own expression, and z is never read.
#include "ops.h"
#include "parallel.h"

namespace fusedres::cpu::FUSEDRES_ISA {
namespace {

enum class Mask { none, from_x, from_z };

template <class F>
inline void with_mask(Mask mask, F f) {
  switch (mask) {
    case Mask::none:
      return f(std::integral_constant<Mask, Mask::none>{});
    case Mask::from_x:
      return f(std::integral_constant<Mask, Mask::from_x>{});
    case Mask::from_z:
      return f(std::integral_constant<Mask, Mask::from_z>{});
  }
}

// Vectors of per-channel values, loaded once for several rows.
struct Channel {
  Vec mean, scale, shift;
};

template <class Lanes>
inline Channel channel(const float* stats, int64_t channels, int64_t c, Lanes lanes) {
  return {load(stats + kMean * channels + c, lanes), load(stats + kScale * channels + c, lanes),
          load(stats + kShift * channels + c, lanes)};
}
inline Channel channel(const float* stats, int64_t channels, int64_t c) {
  return {set(stats[kMean * channels + c]), set(stats[kScale * channels + c]),
          set(stats[kShift * channels + c])};
}

template <Mask kMask, class T>
inline Vec mask(Vec grad, Vec x, Vec z, const Channel& ch) {
  if constexpr (kMask == Mask::from_x) {
    return keep_above(fma(x, ch.scale, ch.shift), set(Stored<T>::zero), grad);
  }
  if constexpr (kMask == Mask::from_z) return keep_above(z, set(0.0f), grad);
  return grad;
}

template <class T>
struct Reduce {
  Shape s;
  const T *grad, *x, *z;
  const float* stats;
  T* du;
  float* sums;
  int threads;

  struct Pair {
    Vec dbias, dweight;  // dweight before the factor rstd
  };

  template <Mask kMask, class Lanes>
  Pair term(int64_t i, Lanes lanes, const Channel& ch) const {
    const Vec xv = load(x + i, lanes);
    const Vec zv = kMask == Mask::from_z ? load(z + i, lanes) : xv;
    const Vec d = mask<kMask, T>(load(grad + i, lanes), xv, zv, ch);
    if constexpr (kMask == Mask::from_z) store(du + i, d, lanes);
    return {d, d * (xv - ch.mean)};
  }

  // The chunks' partial sums, added in their order in double. partial[c * stride] is channel c's
  // dbias, partial[c * stride + to_dweight] its dweight; a chunk has 2C of them.
  void add_chunks(const float* partial, int64_t chunks, int64_t stride, int64_t to_dweight) const {
    const Buffer<double> totals = buffer<double>(2 * s.c);
    double *dbias = totals.get(), *dweight = dbias + s.c;
    for (int64_t c = 0; c < 2 * s.c; ++c) totals[c] = 0;
    for (int64_t k = 0; k < chunks; ++k, partial += 2 * s.c) {
      for (int64_t c = 0; c < s.c; ++c) {
        dbias[c] += partial[c * stride];
        dweight[c] += partial[c * stride + to_dweight];
      }
    }
    for (int64_t c = 0; c < s.c; ++c) {
      sums[kDbias * s.c + c] = static_cast<float>(dbias[c]);
      sums[kDweight * s.c + c] = static_cast<float>(dweight[c] * stats[kRstd * s.c + c]);
    }
  }

  template <Mask kMask>
  void rows() const {
    const Chunks chunks = Chunks::of_rows(s);
    const Buffer<float> memory = buffer<float>(chunks.number * 2 * s.c);
    float* partial = memory.get();  // [chunk][dbias, dweight][C]
    parallel_for(chunks.number, threads, [=, *this](int64_t chunk) {
      float* dbias = partial + chunk * 2 * s.c;
      float* dweight = dbias + s.c;
      for (int64_t c = 0; c < 2 * s.c; ++c) dbias[c] = 0;
      for_each_rows(s.c, chunks.begin(chunk), chunks.end(chunk),
                    [=, *this](int64_t row, auto rows) {
                      for_each_vector(s.c, [&](int64_t c, auto lanes) {
                        const Channel ch = channel(stats, s.c, c, lanes);
                        Pair total = term<kMask>(row * s.c + c, lanes, ch);
                        for (int r = 1; r < rows.value; ++r) {
                          const Pair one = term<kMask>((row + r) * s.c + c, lanes, ch);
                          total = {total.dbias + one.dbias, total.dweight + one.dweight};
                        }
                        store(dbias + c, load(dbias + c, lanes) + total.dbias, lanes);
                        store(dweight + c, load(dweight + c, lanes) + total.dweight, lanes);
                      });
                    });
    });
    add_chunks(partial, chunks.number, 1, s.c);
  }

  template <Mask kMask>
  void planes() const {
    const Buffer<float> memory = buffer<float>(s.n * s.c * 2);
    float* partial = memory.get();  // [N, C][dbias, dweight]
    parallel_for(s.n * s.c, threads, [=, *this](int64_t plane) {
      const Channel ch = channel(stats, s.c, plane % s.c);
      Pair total{set(0.0f), set(0.0f)};
      for_each_vector(s.hw, [&](int64_t i, auto lanes) {
        const Pair one = term<kMask>(plane * s.hw + i, lanes, ch);
        total = {total.dbias + zero_beyond(one.dbias, lanes),
                 total.dweight + zero_beyond(one.dweight, lanes)};
      });
      partial[plane * 2] = sum(total.dbias);
      partial[plane * 2 + 1] = sum(total.dweight);
    });
    add_chunks(partial, s.n, 2, 1);
  }
};

// dx = scale * du + slope * (x - mean) + offset
template <class T>
struct Apply {
  Shape s;
  const T *grad, *x;
  const float *stats, *slope, *offset;  // no slope and offset with fixed statistics
  T* dx;
  int threads;

  template <Mask kMask, bool kBatch, class Lanes>
  void one(int64_t i, Lanes lanes, const Channel& ch, Vec slope_, Vec offset_) const {
    const Vec xv = kBatch || kMask == Mask::from_x ? load(x + i, lanes) : set(0.0f);
    Vec d = mask<kMask, T>(load(grad + i, lanes), xv, xv, ch) * ch.scale;
    if constexpr (kBatch) d = d + fma(xv - ch.mean, slope_, offset_);
    store(dx + i, d, lanes);
  }

  template <Mask kMask, bool kBatch>
  void rows() const {
    const Chunks chunks = Chunks::of_rows(s);
    parallel_for(chunks.number, threads, [=, *this](int64_t chunk) {
      for_each_rows(s.c, chunks.begin(chunk), chunks.end(chunk),
                    [=, *this](int64_t row, auto rows) {
                      for_each_vector(s.c, [&](int64_t c, auto lanes) {
                        const Channel ch = channel(stats, s.c, c, lanes);
                        const Vec slope_ = kBatch ? load(slope + c, lanes) : set(0.0f);
                        const Vec offset_ = kBatch ? load(offset + c, lanes) : set(0.0f);
                        for (int r = 0; r < rows.value; ++r) {
                          one<kMask, kBatch>((row + r) * s.c + c, lanes, ch, slope_, offset_);
                        }
                      });
                    });
    });
  }

  template <Mask kMask, bool kBatch>
  void planes() const {
    parallel_for(s.n * s.c, threads, [=, *this](int64_t plane) {
      const int64_t c = plane % s.c;
      const Channel ch = channel(stats, s.c, c);
      const Vec slope_ = set(kBatch ? slope[c] : 0.0f), offset_ = set(kBatch ? offset[c] : 0.0f);
      for_each_vector(s.hw, [&](int64_t i, auto lanes) {
        one<kMask, kBatch>(plane * s.hw + i, lanes, ch, slope_, offset_);
      });
    });
  }
};

}  // namespace

void bn_act_backward_reduce(DType dtype, Shape s, const void* grad, const void* x, const void* z,
                            const float* stats, bool relu, void* du, float* sums, int threads) {
  const Mask mask = !relu ? Mask::none : z == nullptr ? Mask::from_x : Mask::from_z;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Reduce<T> reduce{s,
                           static_cast<const T*>(grad),
                           static_cast<const T*>(x),
                           static_cast<const T*>(z),
                           stats,
                           static_cast<T*>(du),
                           sums,
                           threads};
    with_mask(mask, [&](auto m) {
      s.planes ? reduce.template planes<m.value>() : reduce.template rows<m.value>();
    });
  });
}

void bn_act_backward_apply(DType dtype, Shape s, const void* grad, const void* x,
                           const float* stats, const float* sums, bool relu, void* dx,
                           int threads) {
  const Buffer<float> coefficients = buffer<float>(2 * s.c);
  float* slope = coefficients.get();
  float* offset = slope + s.c;
  const double per_value = -1.0 / static_cast<double>(s.count());
  for (int64_t c = 0; sums != nullptr && c < s.c; ++c) {
    const double scale = stats[kScale * s.c + c] * per_value;
    slope[c] = static_cast<float>(scale * stats[kRstd * s.c + c] * sums[kDweight * s.c + c]);
    offset[c] = static_cast<float>(scale * sums[kDbias * s.c + c]);
  }
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Apply<T> apply{s,
                         static_cast<const T*>(grad),
                         static_cast<const T*>(x),
                         stats,
                         slope,
                         offset,
                         static_cast<T*>(dx),
                         threads};
    with_mask(relu ? Mask::from_x : Mask::none, [&](auto m) {
      with_flag(sums != nullptr, [&](auto batch) {
        s.planes ? apply.template planes<m.value, batch.value>()
                 : apply.template rows<m.value, batch.value>();
      });
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
