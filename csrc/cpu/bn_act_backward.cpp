// The backward of bn_act, in two passes: per-channel sums, then dx.
//
// du is the gradient behind the ReLU. Where a residual went into the ReLU its mask comes from the
// stored output z and du is written, since it is also the residual's gradient. Elsewhere the mask
// is computed again from x with the forward's own expression, and z is never read. A residual that
// was normalised gets its sums and its gradient in the same two passes.
#include "batch_norm.h"
#include "ops.h"

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

template <Mask kMask, class T>
inline Vec mask(Vec grad, Vec x, Vec z, const Affine& forward) {
  if constexpr (kMask == Mask::from_x) {
    return keep_above(forward(x), set(Stored<T>::zero), grad);
  }
  if constexpr (kMask == Mask::from_z) return keep_above(z, set(0.0f), grad);
  return grad;
}

template <class T>
struct Reduce {
  Shape s;
  const T *grad, *x, *z;
  const float* stats;
  const T* residual;
  const float* residual_stats;
  T* du;
  float *sums, *residual_sums;
  int threads;

  struct Channels {
    Affine forward;
    Vec mean, residual_mean;
  };
  template <bool kResidual, class At>
  Channels channels(int64_t c, At at) const {
    const Vec own = mean(stats, s.c, c, at);
    return {affine(stats, s.c, c, at), own, kResidual ? mean(residual_stats, s.c, c, at) : own};
  }

  // du, du * (x - mean) and du * (r - rmean), before the factors rstd
  struct Terms {
    Vec dbias, dweight, residual;
    Terms operator+(const Terms& other) const {
      return {dbias + other.dbias, dweight + other.dweight, residual + other.residual};
    }
  };

  template <Mask kMask, bool kResidual, class Lanes>
  Terms terms(int64_t i, Lanes lanes, const Channels& ch) const {
    const Vec xv = load(x + i, lanes);
    const Vec zv = kMask == Mask::from_z ? load(z + i, lanes) : xv;
    const Vec d = mask<kMask, T>(load(grad + i, lanes), xv, zv, ch.forward);
    if constexpr (kMask == Mask::from_z) store(du + i, d, lanes);
    const Vec centred = kResidual ? load(residual + i, lanes) - ch.residual_mean : d;
    return {d, d * (xv - ch.mean), d * centred};
  }

  template <Mask kMask, bool kResidual>
  void rows(float* partial) const {
    const int64_t n = (kResidual ? 3 : 2) * s.c;
    const Chunks chunks = Chunks::of_rows(s);
    parallel_for(chunks.number, threads, [=, *this](int64_t chunk) {
      float* own = partial + chunk * n;
      for (int64_t i = 0; i < n; ++i) own[i] = 0;
      const auto add = [](float* to, Vec v, auto lanes) { store(to, load(to, lanes) + v, lanes); };
      for_each_rows(s.c, chunks.begin(chunk), chunks.end(chunk),
                    [=, *this](int64_t row, auto rows) {
                      for_each_vector(s.c, [&](int64_t c, auto lanes) {
                        const Channels ch = channels<kResidual>(c, lanes);
                        Terms total = terms<kMask, kResidual>(row * s.c + c, lanes, ch);
                        for (int r = 1; r < rows.value; ++r) {
                          total = total + terms<kMask, kResidual>((row + r) * s.c + c, lanes, ch);
                        }
                        add(own + c, total.dbias, lanes);
                        add(own + s.c + c, total.dweight, lanes);
                        if constexpr (kResidual) add(own + 2 * s.c + c, total.residual, lanes);
                      });
                    });
    });
  }

  template <Mask kMask, bool kResidual>
  void planes(float* partial) const {
    constexpr int n = kResidual ? 3 : 2;
    parallel_for(s.n * s.c, threads, [=, *this](int64_t plane) {
      const int64_t c = plane % s.c;
      const Channels ch = channels<kResidual>(c, One{});
      Terms total{set(0.0f), set(0.0f), set(0.0f)};
      for_each_vector(s.hw, [&](int64_t i, auto lanes) {
        const Terms one = terms<kMask, kResidual>(plane * s.hw + i, lanes, ch);
        total = total + Terms{zero_beyond(one.dbias, lanes), zero_beyond(one.dweight, lanes),
                              zero_beyond(one.residual, lanes)};
      });
      float* own = partial + plane / s.c * n * s.c + c;
      own[0] = sum(total.dbias);
      own[s.c] = sum(total.dweight);
      if constexpr (kResidual) own[2 * s.c] = sum(total.residual);
    });
  }

  template <Mask kMask, bool kResidual>
  void run() const {
    const int64_t chunks = s.planes ? s.n : Chunks::of_rows(s).number;
    const int64_t n = (kResidual ? 3 : 2) * s.c;
    const Buffer<float> partial = buffer<float>(chunks * n);  // [chunks, 2 or 3, C]
    s.planes ? planes<kMask, kResidual>(partial.get()) : rows<kMask, kResidual>(partial.get());
    const Buffer<double> totals = add_chunks(partial.get(), chunks, n);
    const double* dbias = totals.get();
    write_sums(s, dbias, dbias + s.c, stats, sums);
    if (kResidual) write_sums(s, dbias, dbias + 2 * s.c, residual_stats, residual_sums);
  }
};

template <class T>
struct Apply {
  Shape s;
  const T *grad, *x;
  const float *stats, *sums;
  const T* residual;
  const float *residual_stats, *residual_sums;
  T *dx, *dresidual;
  int threads;

  template <Mask kMask, bool kBatch, bool kResidual, bool kResidualBatch>
  void run() const {
    const float* of_residual = kResidual ? residual_stats : stats;
    for_each_value(s, threads, [=, *this](int64_t c, auto at, auto each) {
      const Affine forward = affine(stats, s.c, c, at);
      const auto to_dx = gradient<kBatch>(stats, sums, s.c, c, at);
      const auto to_dresidual = gradient<kResidualBatch>(of_residual, residual_sums, s.c, c, at);
      each([&](int64_t i, auto lanes) {
        const Vec xv = kBatch || kMask == Mask::from_x ? load(x + i, lanes) : set(0.0f);
        const Vec du = mask<kMask, T>(load(grad + i, lanes), xv, xv, forward);
        if constexpr (kResidual) {
          const Vec rv = kResidualBatch ? load(residual + i, lanes) : set(0.0f);
          store(dresidual + i, to_dresidual(du, rv), lanes);
        }
        store(dx + i, to_dx(du, xv), lanes);  // may be grad's place
      });
    });
  }
};

}  // namespace

void bn_act_backward_reduce(DType dtype, Shape s, const void* grad, const void* x, const void* z,
                            const float* stats, const void* residual, const float* residual_stats,
                            bool relu, void* du, float* sums, float* residual_sums, int threads) {
  const Mask mask = !relu ? Mask::none : z == nullptr ? Mask::from_x : Mask::from_z;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Reduce<T> reduce{s,
                           static_cast<const T*>(grad),
                           static_cast<const T*>(x),
                           static_cast<const T*>(z),
                           stats,
                           static_cast<const T*>(residual),
                           residual_stats,
                           static_cast<T*>(du),
                           sums,
                           residual_sums,
                           threads};
    with_mask(mask, [&](auto m) {
      with_flag(residual != nullptr, [&](auto has_residual) {
        // the mask of a ReLU that a residual went into is not to be had from x
        if constexpr (!(has_residual.value && m.value == Mask::from_x)) {
          reduce.template run<m.value, has_residual.value>();
        }
      });
    });
  });
}

void bn_act_backward_apply(DType dtype, Shape s, const void* grad, const void* x,
                           const float* stats, const float* sums, const void* residual,
                           const float* residual_stats, const float* residual_sums, bool relu,
                           void* dx, void* dresidual, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Apply<T> apply{s,
                         static_cast<const T*>(grad),
                         static_cast<const T*>(x),
                         stats,
                         sums,
                         static_cast<const T*>(residual),
                         residual_stats,
                         residual_sums,
                         static_cast<T*>(dx),
                         static_cast<T*>(dresidual),
                         threads};
    with_flag(sums != nullptr, [&](auto batch) {
      constexpr bool b = batch.value;
      if (residual != nullptr) {
        with_flag(residual_sums != nullptr, [&](auto residual_batch) {
          apply.template run<Mask::none, b, true, residual_batch.value>();
        });
      } else if (relu) {
        apply.template run<Mask::from_x, b, false, false>();
      } else {
        apply.template run<Mask::none, b, false, false>();
      }
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
