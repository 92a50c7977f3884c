// The backward of bn_relu_maxpool, in two passes: per-channel sums, then dx.
//
// du, the gradient behind the pool and the ReLU, is never written. Each pass walks rows 2i and
// 2i + 1 of x together, in which the windows of rows i and i + 1 have all the gradients.
#include "batch_norm.h"
#include "ops.h"
#include "pool.h"

namespace fusedres::cpu::FUSEDRES_ISA {
namespace {

struct Windows {
  Vec grad, index;
  // their gradients where the maximum is at column kw of row kh, else 0
  Vec at(int kh, int kw) const {
    return keep_equal(index, set(static_cast<float>(3 * kh + kw)), grad);
  }
};

template <class T>
struct Unpool {
  Image s;
  Strides d;
  const T* grad;
  const uint8_t* index;

  template <class Lanes>
  Windows windows(int64_t i, Lanes lanes) const {
    return {load(grad + i, lanes), load(index + i, lanes)};
  }

  // Calls f(place, row, du) for the pixels of each place in rows 2i and 2i + 1 of a part; row is
  // the offset of the pixels' row.
  template <class F>
  void rows(int64_t part, int64_t i, const F& f) const {
    const int64_t line = (part * s.oh() + i) * d.line;
    const int64_t row = (part * s.h + 2 * i) * d.row;
    const bool windows_below = i + 1 < s.oh(), pixels_below = 2 * i + 1 < s.h;
    for_each_place(s, part, [=, *this](auto place) {
      const Windows here = windows(line + place.at, place.lanes);
      const Windows right = windows(line + place.at + d.step, place.next);
      f(place, row, Pair{here.at(1, 1), here.at(1, 2) + right.at(1, 0)});
      if (!pixels_below) return;
      Pair du{here.at(2, 1), here.at(2, 2) + right.at(2, 0)};
      if (windows_below) {
        const Windows below = windows(line + d.line + place.at, place.lanes);
        const Windows beside = windows(line + d.line + place.at + d.step, place.next);
        du = {du.even + below.at(0, 1), du.odd + (below.at(0, 2) + beside.at(0, 0))};
      }
      f(place, row + d.row, du);
    });
  }
};

template <class T>
struct Reduce {
  Unpool<T> unpool;
  const T* x;
  const float* stats;
  int threads;

  struct Terms {
    Vec dbias, dweight;  // dweight before the factor rstd
    Terms operator+(const Terms& other) const {
      return {dbias + other.dbias, dweight + other.dweight};
    }
  };

  template <class Place>
  Terms terms(const Place& place, int64_t row, Pair du) const {
    const Vec centre = mean(stats, unpool.s.c, place.channel, place.across());
    const Pair v = place.load_pixels(x + row);
    return {du.even + du.odd, fma(du.even, v.even - centre, du.odd * (v.odd - centre))};
  }

  Chunks chunks() const {
    const Image& s = unpool.s;
    return Chunks::of_bundles(s.n * s.oh(), 2 * s.w, s.c);
  }

  void rows(float* partial) const {
    const int64_t channels = unpool.s.c, oh = unpool.s.oh();
    parallel_for(chunks().number, threads, [=, *this](int64_t chunk) {
      float* dbias = partial + chunk * 2 * channels;
      float* dweight = dbias + channels;
      for (int64_t i = 0; i < 2 * channels; ++i) dbias[i] = 0;
      for (int64_t i = chunks().begin(chunk); i < chunks().end(chunk); ++i) {
        unpool.rows(i / oh, i % oh, [=, *this](const auto& place, int64_t row, Pair du) {
          float *b = dbias + place.channel, *w = dweight + place.channel;
          const Terms total =
              terms(place, row, du) + Terms{load(b, place.lanes), load(w, place.lanes)};
          store(b, total.dbias, place.lanes);
          store(w, total.dweight, place.lanes);
        });
      }
    });
  }

  void planes(float* partial) const {
    const int64_t channels = unpool.s.c, oh = unpool.s.oh();
    parallel_for(unpool.d.parts, threads, [=, *this](int64_t part) {
      Terms total{set(0.0f), set(0.0f)};
      for (int64_t i = 0; i < oh; ++i) {
        unpool.rows(part, i, [&](const auto& place, int64_t row, Pair du) {
          total = total + terms(place, row, du);
        });
      }
      float* own = partial + part / channels * 2 * channels + part % channels;
      own[0] = sum(total.dbias);
      own[channels] = sum(total.dweight);
    });
  }

  void run(float* sums) const {
    const Image& s = unpool.s;
    const int64_t number = s.planes ? s.n : chunks().number;
    const Buffer<float> partial = buffer<float>(number * 2 * s.c);  // [number][dbias, dweight][C]
    s.planes ? planes(partial.get()) : rows(partial.get());
    const Buffer<double> totals = add_chunks(partial.get(), number, 2 * s.c);
    write_sums(s.shape(), totals.get(), totals.get() + s.c, stats, sums);
  }
};

template <bool kBatch, class T>
void apply(const Unpool<T>& unpool, const T* x, const float* stats, const float* sums, T* dx,
           int threads) {
  const int64_t channels = unpool.s.c, oh = unpool.s.oh();
  parallel_for(unpool.d.parts * oh, threads, [=](int64_t i) {
    unpool.rows(i / oh, i % oh, [=](const auto& place, int64_t row, Pair du) {
      const auto to_dx = gradient<kBatch>(stats, sums, channels, place.channel, place.across());
      const Pair v = kBatch ? place.load_pixels(x + row) : du;
      place.store_pixels(dx + row, {to_dx(du.even, v.even), to_dx(du.odd, v.odd)});
    });
  });
}

}  // namespace

void bn_relu_maxpool_backward_reduce(DType dtype, Image s, const void* grad, const uint8_t* index,
                                     const void* x, const float* stats, float* sums, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Unpool<T> unpool{s, Strides{s}, static_cast<const T*>(grad), index};
    Reduce<T>{unpool, static_cast<const T*>(x), stats, threads}.run(sums);
  });
}

void bn_relu_maxpool_backward_apply(DType dtype, Image s, const void* grad, const uint8_t* index,
                                    const void* x, const float* stats, const float* sums, void* dx,
                                    int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Unpool<T> unpool{s, Strides{s}, static_cast<const T*>(grad), index};
    with_flag(sums != nullptr, [&](auto batch) {
      apply<batch.value>(unpool, static_cast<const T*>(x), stats, sums, static_cast<T*>(dx),
                         threads);
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
