// Checks, allocations and dispatch over dtypes of multi-scale deformable attention, for a Backend that has
//   template <typename P> static void forward(const P&);
//   template <typename P> static void backward(const P&, const at::Tensor& gvalue);  // all gradients are zero before
#pragma once

#include <tuple>

#include "../common/tensor.h"
#include "params.h"

namespace vrwkv_ops {

// Checks the arguments and describes them, all contiguous.
struct DeformArguments {
  at::Tensor value, locations, weights;
  at::IntArrayRef shapes;

  DeformArguments(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations, const at::Tensor& weights)
      : value(value.contiguous()), locations(locations.contiguous()), weights(weights.contiguous()), shapes(shapes) {
    TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && locations.size(5) == 2 &&
                    weights.sizes() == locations.sizes().slice(0, 5) && locations.size(0) == value.size(0) &&
                    locations.size(2) == value.size(2),
                "ms_deform_attn: expected value (B, S, H, D), locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P), got ",
                value.sizes(), ", ", locations.sizes(), " and ", weights.sizes());
    const size_t levels = locations.size(3);
    int64_t values = 0;
    bool is_positive = shapes.size() == 2 * levels && levels <= kMaxLevels;
    for (size_t i = 0; is_positive && i < levels; ++i) {
      const int64_t height = shapes[2 * i], width = shapes[2 * i + 1];
      is_positive = height > 0 && width > 0 && height <= value.size(1) / width;  // their product may overflow
      if (is_positive) values += height * width;
    }
    TORCH_CHECK(is_positive && values == value.size(1), "ms_deform_attn: expected height and width of each of ", levels,
                " (at most ", kMaxLevels, ") maps, with ", value.size(1), " values in all, got ", shapes);
    const auto type = value.scalar_type(), accumulation = type == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK((locations.scalar_type() == type || locations.scalar_type() == accumulation) &&
                    weights.scalar_type() == locations.scalar_type() && locations.device() == value.device() &&
                    weights.device() == value.device(),
                "ms_deform_attn: expected locations and weights of type ", type, " or ", accumulation, " on ", value.device(),
                ", got ", locations.scalar_type(), " on ", locations.device(), " and ", weights.scalar_type(), " on ",
                weights.device());
  }

  template <typename P>
  P params() const {
    using point_t = typename P::point_t;
    P p{};
    p.batch = value.size(0), p.values = value.size(1), p.heads = value.size(2), p.channels = value.size(3);
    p.queries = locations.size(1), p.levels = locations.size(3), p.points = locations.size(4);
    int64_t start = 0;
    for (int64_t i = 0; i < p.levels; ++i) {
      p.height[i] = shapes[2 * i], p.width[i] = shapes[2 * i + 1], p.start[i] = start;
      start += p.height[i] * p.width[i];
    }
    p.value = value.const_data_ptr<typename P::scalar_t>();
    p.locations = locations.const_data_ptr<point_t>(), p.weights = weights.const_data_ptr<point_t>();
    return p;
  }

  // Calls body(params) with the parameters' type.
  template <typename Body>
  void dispatch(const Body& body) const {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn", [&] {
      if (locations.scalar_type() == value.scalar_type()) {
        body(params<DeformParams<scalar_t, scalar_t>>());
      } else if constexpr (!std::is_same_v<scalar_t, acc_type<scalar_t>>) {
        body(params<DeformParams<scalar_t, acc_type<scalar_t>>>());
      }
    });
  }
};

template <typename Backend>
at::Tensor ms_deform_attn(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,
                          const at::Tensor& weights) {
  const DeformArguments arguments(value, shapes, locations, weights);
  const at::Tensor out = at::empty({value.size(0), locations.size(1), value.size(2) * value.size(3)}, value.options());
  if (out.numel() == 0) return out;
  arguments.dispatch([&](auto p) {
    p.out = out.mutable_data_ptr<typename decltype(p)::scalar_t>();
    Backend::forward(p);
  });
  return out;
}

template <typename Backend>
std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(const at::Tensor& grad, const at::Tensor& value,
                                                                       at::IntArrayRef shapes, const at::Tensor& locations,
                                                                       const at::Tensor& weights) {
  const DeformArguments arguments(value, shapes, locations, weights);
  TORCH_CHECK(grad.dim() == 3 && grad.size(0) == value.size(0) && grad.size(1) == locations.size(1) &&
                  grad.size(2) == value.size(2) * value.size(3) && grad.scalar_type() == value.scalar_type() &&
                  grad.device() == value.device(),
              "ms_deform_attn_backward: expected a gradient (B, Q, H * D) like value (", value.sizes(), " ",
              value.scalar_type(), "), got ", grad.sizes(), " ", grad.scalar_type());
  const at::Tensor dense = grad.contiguous(), gvalue = at::zeros(value.sizes(), value.options());
  const at::Tensor glocations = at::zeros(locations.sizes(), locations.options());
  const at::Tensor gweights = at::zeros(weights.sizes(), weights.options());
  if (dense.numel() == 0) return {gvalue, glocations, gweights};
  arguments.dispatch([&](auto p) {
    using P = decltype(p);
    p.grad = dense.const_data_ptr<typename P::scalar_t>();
    p.gvalue = gvalue.mutable_data_ptr<typename P::scalar_t>();
    p.glocations = glocations.mutable_data_ptr<typename P::point_t>();
    p.gweights = gweights.mutable_data_ptr<typename P::point_t>();
    Backend::backward(p, gvalue);
  });
  return {gvalue, glocations, gweights};
}

}  // namespace vrwkv_ops
