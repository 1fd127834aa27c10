// A whole loss and its gradient by the tile engine, in one call. For a small batch the steps between the passes, taken
// one by one from Python, cost more than the pairs.
//
// Computes the formulas of small_batch/losses.h, with the same passes over the same tiles as a criterion's reductions.
// Stores what these passes store. Deterministic: any number of threads gives the same bits.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/tile/pass.h"
#include "cpu/tile/rows.h"
#include "small_batch/losses.h"

namespace flashpair {

// How pairs are cut into tiles: tiled.py's Grid.
struct Tiling {
  int64_t size, lanes, slots, capacity;
};

template <class T>
class SmallBatchLoss {
 public:
  SmallBatchLoss(Kernels<T> kernels, const small_batch::Spec& spec, const small_batch::Tensors& tensors,
                 const Tiling& tiling, int threads)
      : kernels_(kernels),
        spec_(spec),
        tensors_(tensors),
        tiling_(tiling),
        threads_(threads),
        summed_(small_batch::summed_side(spec.loss)) {}

  void run() {
    choose_rows();
    gather_rows();
    reduce();
    finish_rows();
    if (tensors_.dx || tensors_.dy) backward();
    propagate_nonfinite();
  }

 private:
  static constexpr int POSITIVE = small_batch::POSITIVE, NEGATIVE = small_batch::NEGATIVE,
                       NO_PAIR = small_batch::NO_PAIR;

  static std::vector<int64_t> order_by_label(const int64_t* labels, int64_t count) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    return order;
  }

  // 1. The anchors and references that take part, in label order, and each anchor's interval of positives.
  void choose_rows() {
    rows_ = order_by_label(tensors_.labels, spec_.n);
    if (!spec_.square) refs_ = order_by_label(tensors_.ref_labels, spec_.m);
    const std::vector<int64_t>& refs = spec_.square ? rows_ : refs_;
    const int64_t* labels = spec_.square ? tensors_.labels : tensors_.ref_labels;
    const int64_t n = rows_.size(), m = refs.size();
    std::vector<int64_t> anchors, positives;
    int64_t begin = 0, end = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = tensors_.labels[rows_[i]];
      const bool first = i == 0 || tensors_.labels[rows_[i - 1]] != label;
      while (begin < m && labels[refs[begin]] < label) ++begin;
      while (end < m && labels[refs[end]] <= label) ++end;
      if (!spec_.one_pair) {
        pos_begin_.push_back(begin), pos_end_.push_back(end);
      } else if (first && begin + spec_.square < end) {
        // The class's first sample is its anchor; its positive is the next sample, or the first reference.
        pos_begin_.push_back(anchors.size()), pos_end_.push_back(anchors.size() + 1);
        anchors.push_back(rows_[i]), positives.push_back(refs[begin + spec_.square]);
      }
    }
    if (spec_.one_pair) rows_ = anchors, refs_ = positives, tiling_.lanes = 1, tiling_.slots = 0;
    square_ = spec_.square && !spec_.one_pair;
  }

  // 2. Their embeddings, normalised, and the problem.
  void gather_rows() {
    auto gather = [&](const void* from, const std::vector<int64_t>& rows, std::vector<T>& to,
                      std::vector<T>& inverse_norm, std::vector<T>& sq_norm) {
      const int64_t count = rows.size(), d = spec_.d;
      to.resize(count * d), inverse_norm.resize(spec_.normalize ? count : 0);
      sorted_rows(static_cast<const T*>(from), rows.data(), count, d, to.data(),
                  spec_.normalize ? inverse_norm.data() : nullptr, threads_);
      for (int64_t i = 0; i < count && spec_.euclidean; ++i)
        sq_norm.push_back(std::inner_product(&to[i * d], &to[i * d] + d, &to[i * d], T(0)));
    };
    gather(tensors_.x, rows_, x_, x_inverse_norm_, x_sq_norm_);
    if (!square_) gather(spec_.square ? tensors_.x : tensors_.y, refs_, y_, y_inverse_norm_, y_sq_norm_);
    const int64_t n = rows_.size(), m = square_ ? n : refs_.size();
    problem_ = {n,
                m,
                m,
                square_,
                pos_begin_.data(),
                pos_end_.data(),
                square_ ? rows_.data() : refs_.data(),
                spec_.euclidean ? x_sq_norm_.data() : nullptr,
                !spec_.euclidean ? nullptr
                : square_        ? x_sq_norm_.data()
                                 : y_sq_norm_.data(),
                false};
  }

  Pass<T> make_pass() const {
    return Pass<T>(kernels_, problem_, x_.data(), y(), spec_.d, tiling_.size, tiling_.lanes);
  }
  const T* y() const { return square_ ? x_.data() : y_.data(); }

  // The reductions of the first pass, in the order of values_ (K, rows).
  std::vector<Reduction<T>> reductions() const {
    auto make = [](int op, int side, double scale, int lower_of, int upper_of, double shift) {
      Reduction<T> r{};
      r.op = op, r.side = side, r.scale = static_cast<T>(scale);
      r.lower_of = lower_of, r.upper_of = upper_of, r.lower_shift = -shift, r.upper_shift = shift;
      return r;
    };
    const double positive = spec_.scale[POSITIVE], negative = spec_.scale[NEGATIVE], epsilon = spec_.epsilon;
    if (summed_ == POSITIVE) return {make(LOGSUMEXP, NEGATIVES, negative, -1, -1, 0)};
    if (summed_ == NEGATIVE) return {make(LOGSUMEXP, POSITIVES, positive, -1, -1, 0)};
    if (!spec_.mined)
      return {make(LOGSUMEXP, NEGATIVES, negative, -1, -1, 0), make(LOGSUMEXP, POSITIVES, positive, -1, -1, 0)};
    return {make(MIN, POSITIVES, 1, -1, -1, 0), make(LOGSUMEXP, NEGATIVES, negative, MINED_MIN, -1, epsilon),
            make(MAX, NEGATIVES, 1, MINED_MIN, -1, epsilon),
            make(LOGSUMEXP, POSITIVES, positive, -1, MINED_MAX, epsilon)};
  }
  // Places in that list: of the windows' bounds, and of a side's log-sum-exp.
  static constexpr int MINED_MIN = 0, MINED_NEGATIVES = 1, MINED_MAX = 2, MINED_POSITIVES = 3;
  static constexpr int PLAIN_NEGATIVES = 0, PLAIN_POSITIVES = 1;
  int lse_place(int side) const {
    return side == POSITIVE ? (spec_.mined ? MINED_POSITIVES : PLAIN_POSITIVES)
                            : (spec_.mined ? MINED_NEGATIVES : PLAIN_NEGATIVES);
  }
  T* values(int k) { return values_.data() + k * problem_.n; }

  // The second pass, of a loss that has one: softplus(scale z + the first pass's log-sum-exp) over the summed side.
  Reduction<T> second_reduction() {
    Reduction<T> r{};
    r.op = SUM, r.side = summed_ == POSITIVE ? POSITIVES : NEGATIVES, r.transform = SOFTPLUS;
    r.scale = static_cast<T>(spec_.scale[summed_]), r.offset = values(0), r.lower_of = r.upper_of = -1;
    return r;
  }

  // 3. The rows' reductions.
  void reduce() {
    const bool list = spec_.mined && (tensors_.dx || tensors_.dy) && tiling_.slots;
    if (list) {
      kept_count_.assign(tiling_.slots, -1);
      kept_entry_.resize(tiling_.slots * tiling_.capacity), kept_z_.resize(tiling_.slots * tiling_.capacity);
    }
    Pass<T> first = make_pass();
    const auto all = reductions();
    for (const Reduction<T>& r : all) first.add(r);
    values_.resize(first.num_value_rows() * problem_.n);
    first.forward(threads_, values_.data(), nullptr, kept(), list ? lse_place(NEGATIVE) : -1);
    sums_.resize(problem_.n);
    if (summed_ == NO_PAIR) return;
    Pass<T> second = make_pass();
    second.add(second_reduction());
    second.forward(threads_, sums_.data(), nullptr, {}, -1);
  }

  KeptLists<T> kept() {
    if (kept_count_.empty()) return {};
    return {kept_count_.data(), kept_entry_.data(), kept_z_.data(), tiling_.capacity};
  }

  // 4. The rows' losses, their average, and the gradients of the two log-sum-exps.
  void finish_rows() {
    const int64_t n = problem_.n;
    const T none = -std::numeric_limits<T>::infinity();
    const T* upstream = static_cast<const T*>(tensors_.upstream);
    T* losses = static_cast<T*>(tensors_.loss);
    const bool row_losses = spec_.averaging == small_batch::NONE;
    if (losses && row_losses) std::fill_n(losses, spec_.n, T(0));
    for (auto& side : slope_) side.resize(n);
    const small_batch::Formula<T> formula = small_batch::formula_of<T>(spec_);
    // Losses are summed some rows at a time: equal ones would all round in the same direction.
    double loss = 0, part = 0, valid = 0, denominator = 0;
    for (int64_t i = 0; i < n; ++i) {
      small_batch::Row<T> row{};
      T* lse = row.anchor.lse;
      for (int side : {POSITIVE, NEGATIVE})
        if (side != summed_) lse[side] = values(summed_ == NO_PAIR ? lse_place(side) : 0)[i];
      // Mining is one decision for both sides: a row without kept positives has no kept negatives.
      if (spec_.mined && lse[POSITIVE] == none) lse[NEGATIVE] = none;
      small_batch::finish_row(formula, row, static_cast<T>(pos_end_[i] - pos_begin_[i] - square_), true, sums_[i],
                              T(0));
      part += row.loss, valid += row.valid, denominator += row.denominator;
      if (i % 16 == 15 || i == n - 1) loss += part, part = 0;
      if (losses && row_losses) losses[rows_[i]] = row.loss;
      for (int side : {POSITIVE, NEGATIVE})
        slope_[side][i] = row.anchor.slope[side] * (upstream ? upstream[rows_[i]] : T(1));
    }
    const double divisor = row_losses || spec_.averaging == small_batch::SUM ? 1 : std::max(denominator, 1.0);
    if (losses && !row_losses) *losses = static_cast<T>(loss / divisor);
    if (tensors_.share) *static_cast<T*>(tensors_.share) = static_cast<T>(valid / divisor);
    for (auto& side : slope_)
      for (T& slope : side) slope /= static_cast<T>(divisor);
  }

  // 5. The gradients of the sorted rows, and back to the caller's order.
  void backward() {
    const int64_t d = spec_.d, n = problem_.n, m = problem_.m;
    T *dx = static_cast<T*>(tensors_.dx), *dy = static_cast<T*>(spec_.square ? tensors_.dx : tensors_.dy);
    std::vector<T> x_grads(dx ? n * d : 0), y_grads(dy && !square_ ? m * d : 0);
    T *x_grad = dx ? x_grads.data() : nullptr, *y_grad = y_grads.empty() ? nullptr : y_grads.data();
    Pass<T> first = make_pass();
    auto all = reductions();
    if (summed_ == NO_PAIR) {
      for (int side : {POSITIVE, NEGATIVE}) all[lse_place(side)].grad = slope_[side].data();
    } else {  // the gradient of the second pass's offset is the gradient of the first pass's log-sum-exp
      std::vector<T>& offset = slope_[1 - summed_];
      std::fill(offset.begin(), offset.end(), T(0));
      Reduction<T> r = second_reduction();
      r.value = sums_.data(), r.grad = slope_[summed_].data(), r.grad_offset = offset.data();
      Pass<T> second = make_pass();
      second.add(r);
      second.backward(threads_, sums_.data(), x_grad, y_grad, {});
      all[0].grad = offset.data();
    }
    for (size_t k = 0, row = all.size(); k < all.size(); ++k) {
      all[k].value = values(k);
      if (all[k].op == LOGSUMEXP) all[k].top_z = values(row), all[k].log_sum = values(row + 1), row += 2;
      first.add(all[k]);
    }
    first.backward(threads_, values_.data(), x_grad, y_grad, kept());
    auto scatter = [&](const std::vector<T>& grads, const std::vector<T>& rows, const std::vector<T>& inverse_norm,
                       const std::vector<int64_t>& perm, T* to) {
      sorted_rows_backward(grads.data(), rows.data(), spec_.normalize ? inverse_norm.data() : nullptr, perm.data(),
                           perm.size(), d, to, threads_);
    };
    if (spec_.one_pair && dx) std::fill_n(dx, spec_.n * d, T(0));
    if (spec_.one_pair && dy && !spec_.square) std::fill_n(dy, spec_.m * d, T(0));
    if (dx) scatter(x_grads, x_, x_inverse_norm_, rows_, dx);
    if (dy && !square_) scatter(y_grads, y_, y_inverse_norm_, refs_, dy);
  }

  // 6. An embedding that is not finite makes every result NaN, also where its sample takes no part.
  void propagate_nonfinite() const {
    auto finite = [&](const void* x, int64_t rows) { return all_finite(static_cast<const T*>(x), rows * spec_.d); };
    const bool others =
        !spec_.one_pair || (finite(tensors_.x, spec_.n) && (spec_.square || finite(tensors_.y, spec_.m)));
    if (all_finite(x_.data(), x_.size()) && all_finite(y_.data(), y_.size()) && others) return;
    fill_nan(static_cast<T*>(tensors_.loss), spec_.averaging == small_batch::NONE ? spec_.n : 1);
    fill_nan(static_cast<T*>(tensors_.dx), int64_t(spec_.n) * spec_.d);
    fill_nan(static_cast<T*>(tensors_.dy), int64_t(spec_.m) * spec_.d);
  }

  Kernels<T> kernels_;
  small_batch::Spec spec_;
  small_batch::Tensors tensors_;
  Tiling tiling_;
  int threads_;
  int summed_;  // small_batch::summed_side
  bool square_ = false;
  std::vector<int64_t> rows_, refs_;  // the samples that take part, as the caller counts them
  std::vector<int64_t> pos_begin_, pos_end_;
  std::vector<T> x_, x_inverse_norm_, x_sq_norm_, y_, y_inverse_norm_, y_sq_norm_, values_, sums_, slope_[2];
  std::vector<int32_t> kept_count_, kept_entry_;
  std::vector<T> kept_z_;
  Problem<T> problem_{};
};

}  // namespace flashpair
