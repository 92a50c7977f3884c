// z = max pool of relu(x * scale + shift), 3x3 of stride 2 and padding 1: x -> z, index.
//
// A row of x is normalised once, into two lines in the activation's type (its even and its odd
// columns), which stay in the cache for the windows over it: so maxima are compared as rounded.
// They start at 0, which makes them the ReLU's and lets padding be 0 as well.
#include <utility>

#include "batch_norm.h"
#include "ops.h"
#include "pool.h"

namespace fusedres::cpu::FUSEDRES_ISA {
namespace {

// A normalised row of x: the even columns, and the odd ones with one of padding before them.
template <class T>
struct Lines {
  T *even, *odd;
};

template <class T>
struct MaxPool {
  Image s;
  Strides d;
  const T* x;
  const float* stats;
  T* z;
  uint8_t* index;

  // three rows of lines and one of zeros, the padding above and below
  int64_t values_of_lines() const { return 2 * d.line + d.step; }
  int64_t values_of_thread() const { return 4 * values_of_lines(); }

  void normalise(int64_t part, int64_t h, Lines<T> to) const {
    const T* row = x + (part * s.h + h) * d.row;
    for_each_place(s, part, [=, *this](auto place) {
      const Affine norm = affine(stats, s.c, place.channel, place.across());
      const Pair v = place.load_pixels(row);
      store(to.even + place.at, norm(v.even), place.lanes);
      store(to.odd + place.at, norm(v.odd), place.odd);
    });
  }

  void pool(int64_t first, const Lines<T> (&rows)[3]) const {
    T* to = z + first;
    uint8_t* index_to = index + first;
    const int64_t step = d.step;
    for_each_vector(d.line, [=](int64_t i, auto lanes) {
      Vec most = set(0.0f), place = set(static_cast<float>(kNowhere));
      for (int kh = 0; kh < 3; ++kh) {
        take_larger(load(rows[kh].odd + i - step, lanes), set(3.0f * kh), most, place);
        take_larger(load(rows[kh].even + i, lanes), set(3.0f * kh + 1), most, place);
        take_larger(load(rows[kh].odd + i, lanes), set(3.0f * kh + 2), most, place);
      }
      store(to + i, most, lanes);
      store(index_to + i, place, lanes);
    });
  }

  // Rows of windows [begin, end), counted through all parts of the image.
  void run(int64_t begin, int64_t end, T* memory) const {
    std::memset(memory, 0, values_of_thread() * sizeof(T));
    Lines<T> lines[4];
    for (Lines<T>& l : lines) {
      l = {memory, memory + d.line + d.step};
      memory += values_of_lines();
    }
    auto& [above, middle, below, zeros] = lines;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t part = row / s.oh(), h = 2 * (row % s.oh());
      if (row == begin && h > 0) {
        normalise(part, h - 1, above);
      } else {
        std::swap(above, below);
      }
      normalise(part, h, middle);
      if (h + 1 < s.h) normalise(part, h + 1, below);
      pool(row * d.line, {h > 0 ? above : zeros, middle, h + 1 < s.h ? below : zeros});
    }
  }
};

}  // namespace

void bn_relu_maxpool(DType dtype, Image s, const void* x, const float* stats, void* z,
                     uint8_t* index, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const MaxPool<T> pool{s,     Strides{s},         static_cast<const T*>(x),
                          stats, static_cast<T*>(z), index};
    const int64_t rows = pool.d.parts * s.oh(), values = pool.values_of_thread();
    const Buffer<T> memory = buffer<T>(threads * values);
    parallel_for(threads, threads, [&](int64_t t) {
      pool.run(rows * t / threads, rows * (t + 1) / threads, memory.get() + t * values);
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
