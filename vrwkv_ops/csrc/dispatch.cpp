// Schemas, autograd and autocast rules of the operators. Only the CPU library compiles this file; it must be loaded before
// the CUDA library. src/vrwkv_ops/definitions.py defines the same for installs without compiled kernels.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "token_shift/params.h"

namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Returns a function that calls an operator through the dispatcher; `Signature` has SymInt where the schema has.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Autograd refuses forward mode, where a tensor has a tangent.
template <typename... Tensors>
bool needs_grad(const Tensors&... tensors) {
  return (at::GradMode::is_enabled() && (tensors.requires_grad() || ...)) || (tensors._fw_grad(0).defined() || ...);
}

// Calls an autograd function, with a node in the graph where a gradient is needed: the node costs more than a small kernel.
template <typename Function, typename... Args>
auto apply(bool needs_grad, Args&&... args) {
  return needs_grad ? Function::apply(std::forward<Args>(args)...) : Function::forward(nullptr, std::forward<Args>(args)...);
}

// --- Bi-WKV -----------------------------------------------------------------------------------

using WkvForward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool);
using WkvBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                               const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                               bool);

std::tuple<Tensor, Tensor, Tensor> call_wkv_forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                                    bool causal, bool save) {
  static const auto op = find<WkvForward>("vrwkv_ops::bi_wkv_forward");
  return op.call(w, u, k, v, causal, save);
}

bool is_accepted(const Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble;
}

// Autocast converts k and v to one type, but not float64.
bool autocast_unifies(const Tensor& k, const Tensor& v) {
  return k.scalar_type() != at::kDouble && v.scalar_type() != at::kDouble &&
         at::autocast::is_autocast_enabled(k.device().type());
}

// Converts the parameters and decides what is kept for backward.
Tensor bi_wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, bool causal) {
  const bool fits = is_accepted(w) && is_accepted(u) && is_accepted(k) && is_accepted(v) && k.dim() == 3 &&
                    v.sym_sizes() == k.sym_sizes() && k.sym_size(1) >= 1 && k.sym_size(2) >= 1 && w.dim() == 1 &&
                    w.sym_size(0) == k.sym_size(2) && u.dim() == 1 && u.sym_size(0) == k.sym_size(2) &&
                    w.device() == k.device() && u.device() == k.device() && v.device() == k.device() &&
                    (v.scalar_type() == k.scalar_type() || autocast_unifies(k, v));
  TORCH_CHECK_VALUE(
      fits,
      "bi_wkv: expected w and u of shape (C,), and k and v of one shape (B, T, C) and one dtype, all of floats, on "
      "one device and not empty; got ",
      w.toString(), w.sym_sizes(), ", ", u.toString(), u.sym_sizes(), ", ", k.toString(), k.sym_sizes(), ", ", v.toString(),
      v.sym_sizes());
  const auto type = k.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return std::get<0>(call_wkv_forward(w.to(type).contiguous(), u.to(type).contiguous(), k, v, causal, needs_grad(w, u, k, v)));
}

struct BiWkv : torch::autograd::Function<BiWkv> {
  static variable_list forward(AutogradContext* ctx, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                               bool causal, bool save) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, y_residual, z] = call_wkv_forward(w, u, k, v, causal, save);
    if (ctx == nullptr) return {y, y_residual, z};
    ctx->mark_non_differentiable({y_residual, z});
    ctx->set_materialize_grads(false);
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["save"] = save;
    if (save) ctx->save_for_backward({w, u, k, v, y, y_residual, z});
    return {y, y_residual, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(ctx->saved_data["save"].toBool(), "vrwkv_ops::bi_wkv_forward needs save=True for a backward pass");
    if (!grads[0].defined()) return variable_list(6);
    static const auto op = find<WkvBackward>("vrwkv_ops::bi_wkv_backward");
    const auto saved = ctx->get_saved_variables();
    auto [gw, gu, gk, gv] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                                    ctx->saved_data["causal"].toBool());
    return {gw, gu, gk, gv, Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> bi_wkv_forward_autograd(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                                           bool causal, bool save) {
  const auto results = apply<BiWkv>(needs_grad(w, u, k, v), w, u, k, v, causal, save);
  return {results[0], results[1], results[2]};
}

// k and v take autocast's dtype; w and u keep the accumulation dtype.
template <at::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> bi_wkv_forward_autocast(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                                           bool causal, bool save) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  if (k.scalar_type() == at::kDouble) return call_wkv_forward(w, u, k, v, causal, save);
  const auto type = at::autocast::get_autocast_dtype(device);
  return call_wkv_forward(w, u, k.to(type), v.to(type), causal, save);
}

// --- Bi-WKV6 ----------------------------------------------------------------------------------

using Wkv6Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool);
using Wkv6Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                        const Tensor&, const Tensor&, const Tensor&, bool);

Tensor call_wkv6_forward(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, bool causal) {
  static const auto op = find<Wkv6Forward>("vrwkv_ops::bi_wkv6_forward");
  return op.call(r, k, v, w, u, causal);
}

struct BiWkv6 : torch::autograd::Function<BiWkv6> {
  static Tensor forward(AutogradContext* ctx, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                        const Tensor& u, bool causal) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (ctx != nullptr) {
      ctx->saved_data["causal"] = causal;
      ctx->save_for_backward({r, k, v, w, u});
    }
    return call_wkv6_forward(r, k, v, w, u, causal);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<Wkv6Backward>("vrwkv_ops::bi_wkv6_backward");
    const auto saved = ctx->get_saved_variables();
    auto [gr, gk, gv, gw, gu] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], ctx->saved_data["causal"].toBool());
    return {gr, gk, gv, gw, gu, Tensor()};
  }
};

Tensor bi_wkv6_forward_autograd(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                                bool causal) {
  return apply<BiWkv6>(needs_grad(r, k, v, w, u), r, k, v, w, u, causal);
}

// Converts to float32: results grow with the number of tokens.
template <at::DeviceType device>
Tensor bi_wkv6_forward_autocast(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                                bool causal) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  if (v.scalar_type() == at::kDouble) return call_wkv6_forward(r, k, v, w, u, causal);
  const auto type = at::kFloat;
  return call_wkv6_forward(r.to(type), k.to(type), v.to(type), w.to(type), u.to(type), causal);
}

// --- Token shifts -----------------------------------------------------------------------------

using QShift = Tensor(const Tensor&, SymInt, SymInt, int64_t, double, bool, int64_t);
using TokenShiftForward = std::vector<Tensor>(const Tensor&, const Tensor&, SymInt, SymInt, int64_t, double, c10::string_view,
                                              int64_t);
using TokenShiftBackward = std::tuple<Tensor, Tensor>(at::TensorList, const Tensor&, const Tensor&, SymInt, SymInt, int64_t,
                                                      double, c10::string_view, int64_t);

Tensor call_q_shift(const Tensor& x, SymInt height, SymInt width, int64_t shift_pixel, double channel_gamma, bool reverse,
                    int64_t heads) {
  static const auto op = find<QShift>("vrwkv_ops::q_shift");
  return op.call(x, std::move(height), std::move(width), shift_pixel, channel_gamma, reverse, heads);
}

std::vector<Tensor> call_token_shift_forward(const Tensor& x, const Tensor& mixes, SymInt height, SymInt width,
                                             int64_t shift_pixel, double channel_gamma, c10::string_view mode, int64_t heads) {
  static const auto op = find<TokenShiftForward>("vrwkv_ops::token_shift_forward");
  return op.call(x, mixes, std::move(height), std::move(width), shift_pixel, channel_gamma, mode, heads);
}

// Checks the arguments, which the kernels of other devices do not, and joins the mixes.
std::vector<Tensor> token_shift(const Tensor& x, at::TensorList mixes, SymInt height, SymInt width, int64_t shift_pixel,
                                double channel_gamma, c10::string_view mode, int64_t heads) {
  const bool is_single = mode == "single_shift", has_grid = mode == "q_shift";
  bool fits = is_accepted(x) && x.dim() == 3 && (is_single || has_grid || mode == "double_shift") && height >= 1 &&
              width >= 1 && (has_grid || height == 1) && x.sym_size(1) == height * width && shift_pixel >= 0 &&
              channel_gamma > 0 && channel_gamma <= 0.25 && heads >= 1 && x.sym_size(2) % heads == 0 && !mixes.empty() &&
              mixes.size() <= vrwkv_ops::kMaxMixes;
  // No group of channels may be empty.
  fits = fits && (is_single || (x.sym_size(2) / heads).guard_int(__FILE__, __LINE__) * channel_gamma >= 1);
  for (const Tensor& mix : mixes)
    fits = fits && is_accepted(mix) && (mix.dim() == 1 || mix.dim() == 3) && mix.sym_numel() == x.sym_size(2) &&
           mix.sym_size(-1) == x.sym_size(2) && mix.device() == x.device();
  TORCH_CHECK_VALUE(
      fits,
      "token_shift: expected x of shape (B, height * width, C), and mixes of shape (C,) or (1, 1, C), all of floats "
      "and on one device; got ",
      x.toString(), x.sym_sizes(), ", height ", height, ", width ", width, ", ", mixes.size(), " mixes, shift_pixel ",
      shift_pixel, ", channel_gamma ", channel_gamma, ", mode ", mode, ", heads ", heads);
  std::vector<Tensor> rows;
  for (const Tensor& mix : mixes) rows.push_back(mix.reshape_symint({1, x.sym_size(2)}));
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return call_token_shift_forward(x, at::cat(rows).to(type), std::move(height), std::move(width), shift_pixel, channel_gamma,
                                  mode, heads);
}

struct QShiftFunction : torch::autograd::Function<QShiftFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const SymInt& height, const SymInt& width, int64_t shift_pixel,
                        double channel_gamma, bool reverse, int64_t heads) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (ctx != nullptr) {
      auto& saved = ctx->saved_data;
      saved["height"] = height, saved["width"] = width, saved["shift_pixel"] = shift_pixel;
      saved["channel_gamma"] = channel_gamma, saved["reverse"] = reverse, saved["heads"] = heads;
    }
    return call_q_shift(x, height, width, shift_pixel, channel_gamma, reverse, heads);
  }

  // The adjoint of a shift is the reverse shift.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& saved = ctx->saved_data;
    variable_list results(7);
    results[0] = call_q_shift(grads[0], saved["height"].toSymInt(), saved["width"].toSymInt(), saved["shift_pixel"].toInt(),
                              saved["channel_gamma"].toDouble(), !saved["reverse"].toBool(), saved["heads"].toInt());
    return results;
  }
};

Tensor q_shift_autograd(const Tensor& x, SymInt height, SymInt width, int64_t shift_pixel, double channel_gamma, bool reverse,
                        int64_t heads) {
  return apply<QShiftFunction>(needs_grad(x), x, height, width, shift_pixel, channel_gamma, reverse, heads);
}

struct TokenShiftFunction : torch::autograd::Function<TokenShiftFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& mixes, const SymInt& height,
                               const SymInt& width, int64_t shift_pixel, double channel_gamma, const std::string& mode,
                               int64_t heads) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (ctx != nullptr) {
      auto& saved = ctx->saved_data;
      saved["height"] = height, saved["width"] = width, saved["shift_pixel"] = shift_pixel;
      saved["channel_gamma"] = channel_gamma, saved["mode"] = mode, saved["heads"] = heads;
      ctx->save_for_backward({x, mixes});
    }
    return call_token_shift_forward(x, mixes, height, width, shift_pixel, channel_gamma, mode, heads);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<TokenShiftBackward>("vrwkv_ops::token_shift_backward");
    auto& saved = ctx->saved_data;
    const auto tensors = ctx->get_saved_variables();
    variable_list results(8);
    std::tie(results[0], results[1]) = op.call(
        grads, tensors[0], tensors[1], saved["height"].toSymInt(), saved["width"].toSymInt(), saved["shift_pixel"].toInt(),
        saved["channel_gamma"].toDouble(), saved["mode"].toStringView(), saved["heads"].toInt());
    return results;
  }
};

std::vector<Tensor> token_shift_forward_autograd(const Tensor& x, const Tensor& mixes, SymInt height, SymInt width,
                                                 int64_t shift_pixel, double channel_gamma, c10::string_view mode,
                                                 int64_t heads) {
  return apply<TokenShiftFunction>(needs_grad(x, mixes), x, mixes, height, width, shift_pixel, channel_gamma, std::string(mode),
                                   heads);
}

// --- Multi-scale deformable attention ---------------------------------------------------------

using Deform = Tensor(const Tensor&, c10::SymIntArrayRef, const Tensor&, const Tensor&);
using DeformBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, c10::SymIntArrayRef, const Tensor&,
                                                          const Tensor&);

// One argument for autograd, which counts the elements of a list.
struct Shapes {
  c10::SymIntArrayRef sides;
};

struct MsDeformAttn : torch::autograd::Function<MsDeformAttn> {
  static Tensor forward(AutogradContext* ctx, const Tensor& value, const Shapes& shapes, const Tensor& locations,
                        const Tensor& weights) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find<Deform>("vrwkv_ops::ms_deform_attn");
    if (ctx != nullptr) {
      ctx->save_for_backward({value, locations, weights});
      ctx->saved_data["shapes"] = shapes.sides;
    }
    return op.call(value, shapes.sides, locations, weights);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<DeformBackward>("vrwkv_ops::ms_deform_attn_backward");
    const auto saved = ctx->get_saved_variables();
    const auto shapes = ctx->saved_data["shapes"].toSymIntVector();
    auto [gvalue, glocations, gweights] = op.call(grads[0], saved[0], shapes, saved[1], saved[2]);
    return {gvalue, Tensor(), glocations, gweights};
  }
};

Tensor ms_deform_attn_autograd(const Tensor& value, c10::SymIntArrayRef shapes, const Tensor& locations,
                               const Tensor& weights) {
  return apply<MsDeformAttn>(needs_grad(value, locations, weights), value, Shapes{shapes}, locations, weights);
}

// --- Element-wise functions -------------------------------------------------------------------

struct SquaredRelu : torch::autograd::Function<SquaredRelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find<Tensor(const Tensor&)>("vrwkv_ops::squared_relu");
    if (ctx != nullptr) ctx->save_for_backward({x});
    return op.call(x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("vrwkv_ops::squared_relu_backward");
    return {op.call(grads[0], ctx->get_saved_variables()[0])};
  }
};

Tensor squared_relu_autograd(const Tensor& x) { return apply<SquaredRelu>(needs_grad(x), x); }

struct SigmoidGate : torch::autograd::Function<SigmoidGate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& r, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("vrwkv_ops::sigmoid_gate");
    if (ctx != nullptr) ctx->save_for_backward({r, x});
    return op.call(r, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&);
    static const auto op = find<Signature>("vrwkv_ops::sigmoid_gate_backward");
    const auto saved = ctx->get_saved_variables();
    auto [gr, gx] = op.call(grads[0], saved[0], saved[1]);
    return {gr, gx};
  }
};

Tensor sigmoid_gate_autograd(const Tensor& r, const Tensor& x) { return apply<SigmoidGate>(needs_grad(r, x), r, x); }

// --- Gradients: a second derivative raises an error -------------------------------------------

using Stack = torch::jit::Stack;

struct DifferentiableOnce : torch::autograd::Function<DifferentiableOnce> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const c10::OperatorHandle& op,
                               c10::DispatchKeySet keys, Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->saved_data["name"] = op.schema().name();
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    variable_list results;
    for (const auto& result : *stack) results.push_back(result.toTensor());
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    const std::string name = ctx->saved_data["name"].toStringRef(), space = "vrwkv_ops::", suffix = "_backward";
    const std::string op = name.substr(space.size(), name.size() - space.size() - suffix.size());
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, op,
        " is differentiable once only. Call backward or torch.autograd.grad without create_graph=True, or use "
        "vrwkv_ops.reference.",
        op, "_reference for higher derivatives");
  }
};

// The autograd rule of every NAME_backward.
void differentiable_once(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Stack arguments(std::make_move_iterator(stack->end() - count), std::make_move_iterator(stack->end()));
  stack->resize(stack->size() - count);
  variable_list inputs;
  for (const auto& argument : arguments) {
    if (argument.isTensor()) inputs.push_back(argument.toTensor());
    if (argument.isTensorList())
      for (const Tensor& x : argument.toTensorVector()) inputs.push_back(x);
  }
  for (const Tensor& result : DifferentiableOnce::apply(at::TensorList(inputs), op, keys, &arguments)) stack->push_back(result);
}

}  // namespace

TORCH_LIBRARY(vrwkv_ops, m) {
  for (const char* schema : {
           "bi_wkv(Tensor w, Tensor u, Tensor k, Tensor v, bool causal) -> Tensor",
           "bi_wkv_forward(Tensor w, Tensor u, Tensor k, Tensor v, bool causal, bool save)"
           " -> (Tensor y, Tensor y_residual, Tensor z)",
           "bi_wkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, Tensor y, Tensor y_residual, Tensor z,"
           " bool causal) -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv)",
           "bi_wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, bool causal) -> Tensor",
           "bi_wkv6_backward(Tensor gy, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, bool causal)"
           " -> (Tensor gr, Tensor gk, Tensor gv, Tensor gw, Tensor gu)",
           "q_shift(Tensor x, SymInt height, SymInt width, int shift_pixel, float channel_gamma, bool reverse, int heads=1)"
           " -> Tensor",
           "token_shift(Tensor x, Tensor[] mixes, SymInt height, SymInt width, int shift_pixel, float channel_gamma,"
           " str mode, int heads=1) -> Tensor[]",
           "token_shift_forward(Tensor x, Tensor mixes, SymInt height, SymInt width, int shift_pixel, float channel_gamma,"
           " str mode, int heads=1) -> Tensor[]",
           "token_shift_backward(Tensor[] grads, Tensor x, Tensor mixes, SymInt height, SymInt width, int shift_pixel,"
           " float channel_gamma, str mode, int heads=1) -> (Tensor gx, Tensor gmixes)",
           "ms_deform_attn(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor",
           "ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights)"
           " -> (Tensor gvalue, Tensor glocations, Tensor gweights)",
           "squared_relu(Tensor x) -> Tensor",
           "squared_relu_backward(Tensor grad, Tensor x) -> Tensor",
           "sigmoid_gate(Tensor r, Tensor x) -> Tensor",
           "sigmoid_gate_backward(Tensor grad, Tensor r, Tensor x) -> (Tensor gr, Tensor gx)",
       })
    m.def(schema, {at::Tag::pt2_compliant_tag});
  m.impl("bi_wkv", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(bi_wkv));
  m.impl("token_shift", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(token_shift));
}

TORCH_LIBRARY_IMPL(vrwkv_ops, Autograd, m) {
  m.impl("bi_wkv_forward", bi_wkv_forward_autograd);
  m.impl("bi_wkv6_forward", bi_wkv6_forward_autograd);
  m.impl("q_shift", q_shift_autograd);
  m.impl("token_shift_forward", token_shift_forward_autograd);
  m.impl("ms_deform_attn", ms_deform_attn_autograd);
  m.impl("squared_relu", squared_relu_autograd);
  m.impl("sigmoid_gate", sigmoid_gate_autograd);
  for (const char* name : {"bi_wkv_backward", "bi_wkv6_backward", "token_shift_backward", "ms_deform_attn_backward",
                           "squared_relu_backward", "sigmoid_gate_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&differentiable_once>());
}

TORCH_LIBRARY_IMPL(vrwkv_ops, AutocastCPU, m) {
  m.impl("bi_wkv_forward", bi_wkv_forward_autocast<at::kCPU>);
  m.impl("bi_wkv6_forward", bi_wkv6_forward_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(vrwkv_ops, AutocastCUDA, m) {
  m.impl("bi_wkv_forward", bi_wkv_forward_autocast<at::kCUDA>);
  m.impl("bi_wkv6_forward", bi_wkv6_forward_autocast<at::kCUDA>);
}
