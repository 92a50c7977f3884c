// How a max pool of 3x3, stride 2 and padding 1 walks an image, in either layout.
//
// Window j of a row of windows goes with the input columns 2j and 2j + 1: it takes those and column
// 2j - 1, the odd one of window j - 1. So in a line of even columns and a line of odd columns, each
// as long as a line of windows, all that a vector of windows needs lies side by side too.
#pragma once

#include <utility>

#include "parallel.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// Parts of an image that are apart in memory, and distances within one, in values.
struct Strides {
  int64_t parts, step, line, row;  // from pixel to pixel, a line of windows, a row of pixels

  explicit Strides(const Image& s)
      : parts(s.planes ? s.n * s.c : s.n),
        step(s.planes ? 1 : s.c),
        line(s.ow() * step),
        row(s.w * step) {}
};

// A vector of windows at offset `at` of their line, with its pixels from offset `pixel` of a row.
// Lanes say how much of it exists: of the windows, of the odd columns, of the next windows. The
// channels are load(v + channel, across()) of a v [C].
template <class Lanes>
struct Place {
  int64_t at, pixel, channel;
  Lanes lanes, odd, next;
};

// channels_last: a vector along the channels of one window, its columns a step apart.
template <class Lanes>
struct Across : Place<Lanes> {
  int64_t step;
  Lanes across() const { return this->lanes; }
  template <class T>
  Pair load_pixels(const T* row) const {
    const T* p = row + this->pixel;
    return {load(p, this->lanes), load(p + step, this->odd)};
  }
  template <class T>
  void store_pixels(T* row, Pair pair) const {
    T* p = row + this->pixel;
    store(p, pair.even, this->lanes);
    store(p + step, pair.odd, this->odd);
  }
};

inline int count(All) { return Vec::width; }
inline int count(First lanes) { return lanes.n; }

// NCHW: a vector along the windows of one channel, their columns in turn.
template <class Lanes>
struct Along : Place<Lanes> {
  One across() const { return {}; }
  int pixels() const { return count(this->lanes) + count(this->odd); }
  template <class T>
  Pair load_pixels(const T* row) const {
    return load_pairs(row + this->pixel, pixels());
  }
  template <class T>
  void store_pixels(T* row, Pair pair) const {
    store_pairs(row + this->pixel, pair, pixels());
  }
};

// Calls f with every place of a line of windows, in part `part` of the image.
template <class F>
inline void for_each_place(const Image& s, int64_t part, const F& f) {
  const int64_t last = s.ow() - 1;
  if (s.planes) {
    int64_t j = 0;
    for (; j + Vec::width <= last; j += Vec::width)
      f(Along<All>{{j, 2 * j, part % s.c, {}, {}, {}}});
    const int n = static_cast<int>(s.ow() - j);
    const int odd = static_cast<int>(s.w / 2 - j);
    f(Along<First>{{j, 2 * j, part % s.c, First{n}, First{odd}, First{n - 1}}});
    return;
  }
  for (int64_t j = 0; j < last; ++j) {
    for_each_vector(s.c, [&](int64_t c, auto lanes) {
      f(Across<decltype(lanes)>{{j * s.c + c, 2 * j * s.c + c, c, lanes, lanes, lanes}, s.c});
    });
  }
  const bool odd = s.w % 2 == 0;
  for (int64_t c = 0; c < s.c; c += Vec::width) {
    const First lanes{static_cast<int>(s.c - c < Vec::width ? s.c - c : Vec::width)};
    f(Across<First>{
        {last * s.c + c, 2 * last * s.c + c, c, lanes, odd ? lanes : First{0}, First{0}}, s.c});
  }
}

// A row of pixels: the even columns, and the odd ones with one of padding before them.
template <class T>
struct Lines {
  T *even, *odd;
};

// The walk over rows of windows. A row of pixels becomes lines once, in the activation's type,
// which stay in the cache for the windows over it: so maxima are compared as rounded. Padding is 0.
template <class T>
class RowsOfWindows {
 public:
  RowsOfWindows(const Image& image, const T* x) : s(image), d(image), x(x) {}

  // The distance in a line of odd columns to the window before.
  int64_t step() const { return d.step; }
  // Values in a line of windows.
  int64_t line() const { return d.line; }

  // Calls pool(first, lines) with the offset of every row of windows and the lines of its three
  // rows of pixels; of(place) gives the function that makes of pixels what is compared.
  template <class Of, class Pool>
  void for_each(int threads, const Of& of, const Pool& pool) const {
    const int64_t rows = d.parts * s.oh(), values = kLines * values_of_lines();
    const Buffer<T> memory = buffer<T>(threads * values);
    parallel_for(threads, threads, [&](int64_t t) {
      walk(rows * t / threads, rows * (t + 1) / threads, memory.get() + t * values, of, pool);
    });
  }

 private:
  static constexpr int kLines = 4;  // three rows, and one of zeros: the padding above and below
  Image s;
  Strides d;
  const T* x;

  int64_t values_of_lines() const { return 2 * d.line + d.step; }

  template <class Of>
  void fill(int64_t part, int64_t h, Lines<T> to, const Of& of) const {
    const T* row = x + (part * s.h + h) * d.row;
    for_each_place(s, part, [=](auto place) {
      const auto f = of(place);
      const Pair v = place.load_pixels(row);
      store(to.even + place.at, f(v.even), place.lanes);
      store(to.odd + place.at, f(v.odd), place.odd);
    });
  }

  // Rows of windows [begin, end), counted through all parts of the image.
  template <class Of, class Pool>
  void walk(int64_t begin, int64_t end, T* memory, const Of& of, const Pool& pool) const {
    std::memset(memory, 0, kLines * values_of_lines() * sizeof(T));
    Lines<T> lines[kLines];
    for (Lines<T>& l : lines) {
      l = {memory, memory + d.line + d.step};
      memory += values_of_lines();
    }
    auto& [above, middle, below, zeros] = lines;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t part = row / s.oh(), h = 2 * (row % s.oh());
      if (row == begin && h > 0) {
        fill(part, h - 1, above, of);
      } else {
        std::swap(above, below);
      }
      fill(part, h, middle, of);
      if (h + 1 < s.h) fill(part, h + 1, below, of);
      const Lines<T> three[3] = {h > 0 ? above : zeros, middle, h + 1 < s.h ? below : zeros};
      pool(row * d.line, three);
    }
  }
};

}  // namespace fusedres::cpu::FUSEDRES_ISA
