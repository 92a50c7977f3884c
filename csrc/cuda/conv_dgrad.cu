#include <limits>

#include "conv_dgrad.cuh"
#include "launch.cuh"

namespace fusedres::cuda {
namespace {

// Tiles of positions by channels of dx: a large one, and a small one where there are few of those.
// The two tensors of the prologue leave room for three stages.
template <class T>
struct DgradTiles {
  using Large = ConvTile<T, 128, 128, 4, 2, 3, 2>;
  using Small = ConvTile<T, 64, 64, 4, 1, 3, 4>;
};
template <>
struct DgradTiles<float> {
  using Large = ConvTile<float, 128, 64, 8, 1, 3, 2>;
  using Small = ConvTile<float, 64, 64, 4, 1, 3, 4>;
};

// Calls f with a null pointer of the tile for so many positions by channels.
template <class T, class F>
void with_tile(int64_t rows, int64_t channels, int multiprocessors, F f) {
  using Large = typename DgradTiles<T>::Large;
  using Small = typename DgradTiles<T>::Small;
  const int64_t large = divide_up(rows, Large::kM) * divide_up(channels, Large::kN);
  if (channels >= Large::kN && large >= multiprocessors) {
    f(static_cast<Large*>(nullptr));
  } else {
    f(static_cast<Small*>(nullptr));
  }
}

// A column of blocks for each tile of channels, as many rows of blocks as are resident together.
template <class Tile>
dim3 grid_of(int64_t rows, int64_t channels, int64_t together) {
  const int64_t across = divide_up(channels, Tile::kN);
  const int64_t busy = std::max<int64_t>(together / across, 1);
  const int64_t down = std::min({divide_up(rows, Tile::kM), busy, kMostRowBlocks});
  return dim3(static_cast<unsigned>(across), static_cast<unsigned>(down));
}

// What the kernel takes for granted.
void check(const std::string& problem, int64_t rows, const Image& dx, int64_t filters, int side,
           int64_t add_pitch, std::initializer_list<const void*> tensors) {
  const auto refuse = [&](const char* why) {
    throw std::invalid_argument("conv_dgrad of " + problem + why);
  };
  if (side != 1 && side != 3) refuse(": the side must be 1 or 3");
  if (filters < 1 || filters % 8 != 0 || dx.channels % 8 != 0 || add_pitch % 8 != 0) {
    refuse(": channels, filters and add's pitch must be multiples of 8");
  }
  for (const void* tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor) % kAccessBytes != 0) {
      refuse(": tensors must begin at multiples of 16 bytes");
    }
  }
  // a grid of blocks steps past the end; a tap is a row and a pixel away from a tile's
  constexpr int64_t kMost = std::numeric_limits<int>::max(), kMostM = 128;
  if (rows + kMostRowBlocks * kMostM > kMost || side * side * filters * dx.channels > kMost ||
      (kMostM + dx.width + 1) * filters > kMost) {
    refuse(" is too large for int32");
  }
}

}  // namespace

int64_t conv_dgrad_workspace(DType dtype, Image dx, int multiprocessors) {
  const int64_t rows = dx.n * dx.height * dx.width;
  int64_t floats = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_tile<T>(rows, dx.channels, multiprocessors, [&](auto* tile) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      floats = 2 * dx.channels *
               grid_of<Tile>(rows, dx.channels, most_together<Tile>(multiprocessors)).y;
    });
  });
  return floats;
}

void conv_dgrad(DType dtype, Image image_of_dx, int64_t filters, int side, const void* du,
                const void* y, const float* y_stats, const float* y_sums, const void* weight,
                const void* add, int64_t add_pitch, bool compact, const void* x,
                const float* x_stats, bool relu, float* workspace, void* dx, float* x_sums,
                Device device) {
  const int64_t n = image_of_dx.n, channels = image_of_dx.channels;
  const int64_t height = image_of_dx.height, width = image_of_dx.width;
  const std::string problem = image(image_of_dx) + " by " + std::to_string(filters) +
                              " filters of " + std::to_string(side) + "x" + std::to_string(side);
  const int64_t rows = n * height * width;
  check(problem, rows, image_of_dx, filters, side, add_pitch,
        {du, y, y_stats, y_sums, weight, add, x, x_stats, dx});
  const ConvShape s = {static_cast<int>(rows),
                       static_cast<int>(filters),
                       static_cast<int>(channels),
                       static_cast<int>(height),
                       static_cast<int>(width),
                       static_cast<int>(height),
                       static_cast<int>(width),
                       side,
                       1};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_tile<T>(rows, channels, device.multiprocessors, [&](auto* tile) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      with_flag(y_stats != nullptr, [&](auto prologue) {
        constexpr int kBytes = ConvDgradMemory<Tile, prologue.value>::kBytes;
        const int64_t blocks = together<Tile, kBytes>(device.multiprocessors);
        const Grid g = {grid_of<Tile>(rows, channels, blocks), dim3(Tile::kThreads), kBytes};
        launch("conv_dgrad", problem, g, device.stream, conv_dgrad_kernel<Tile, prologue.value>,
               static_cast<const T*>(du), static_cast<const T*>(y_sums == nullptr ? nullptr : y),
               y_stats, y_sums, static_cast<const T*>(weight),
               Added<T>{static_cast<const T*>(add), static_cast<int>(add_pitch), compact},
               static_cast<const T*>(x), x_stats, relu && x != nullptr, static_cast<T*>(dx),
               x_sums == nullptr ? nullptr : workspace, s);
        if (x_sums == nullptr) return;
        launch("conv_dgrad (finalize)", problem, over_partial_results(channels), device.stream,
               bn_act_backward_finalize_kernel<2>, static_cast<const float*>(workspace), x_stats,
               static_cast<const float*>(nullptr), x_sums, static_cast<float*>(nullptr), rows,
               static_cast<int>(g.grid.y), channels);
      });
    });
  });
}

}  // namespace fusedres::cuda
