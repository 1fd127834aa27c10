// A whole loss and its gradient by the tile engine, in one call: for a small batch the steps between the passes, taken
// one by one from Python, cost more than the pairs.
//
// Computes whole/losses.h's formulas. The same passes over the same tiles as the reductions that a
// criterion asks for one by one, so the same memory, and the same bits with any number of threads.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/tile/pass.h"
#include "cpu/tile/rows.h"
#include "small_batch/losses.h"

namespace flashpair {

// How pairs are cut into tiles: tiled.py's Grid.
struct Cut {
  int64_t size, lanes, slots, capacity;
};

template <class T>
class WholeLoss {
 public:
  WholeLoss(Kernels<T> kernels, const whole::Job& job, const whole::Tensors& at, const Cut& cut, int threads)
      : kernels_(kernels), job_(job), at_(at), cut_(cut), threads_(threads), summed_(whole::summed_side(job.loss)) {}

  void run() {
    choose_rows();
    gather();
    reduce();
    finish();
    if (at_.dx || at_.dy) gradient();
    spoil();
  }

 private:
  static std::vector<int64_t> by_label(const int64_t* labels, int64_t count) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    return order;
  }

  // Which anchors and references take part, in label order, and each anchor's interval of positives.
  void choose_rows() {
    rows_ = by_label(at_.labels, job_.n);
    if (!job_.square) refs_ = by_label(at_.ref_labels, job_.m);
    const std::vector<int64_t>& refs = job_.square ? rows_ : refs_;
    const int64_t* labels = job_.square ? at_.labels : at_.ref_labels;
    const int64_t n = rows_.size(), m = refs.size();
    std::vector<int64_t> anchors, positives;
    int64_t lo = 0, hi = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = at_.labels[rows_[i]];
      const bool first = i == 0 || at_.labels[rows_[i - 1]] != label;
      while (lo < m && labels[refs[lo]] < label) ++lo;
      while (hi < m && labels[refs[hi]] <= label) ++hi;
      if (!job_.one_pair) {
        lo_.push_back(lo), hi_.push_back(hi);
      } else if (first && lo + job_.square < hi) {  // a class's first sample, and the next one or the first reference
        lo_.push_back(anchors.size()), hi_.push_back(anchors.size() + 1);
        anchors.push_back(rows_[i]), positives.push_back(refs[lo + job_.square]);
      }
    }
    if (job_.one_pair) rows_ = anchors, refs_ = positives, cut_.lanes = 1, cut_.slots = 0;
    square_ = job_.square && !job_.one_pair;
  }

  void gather() {
    auto take = [&](const void* from, const std::vector<int64_t>& rows, std::vector<T>& to, std::vector<T>& inverse,
                    std::vector<T>& squares) {
      const int64_t count = rows.size(), d = job_.d;
      to.resize(count * d), inverse.resize(job_.unit ? count : 0);
      sorted_rows(static_cast<const T*>(from), rows.data(), count, d, to.data(), job_.unit ? inverse.data() : nullptr,
                  threads_);
      for (int64_t i = 0; i < count && job_.euclidean; ++i)
        squares.push_back(std::inner_product(&to[i * d], &to[i * d] + d, &to[i * d], T(0)));
    };
    take(at_.x, rows_, x_, x_inverse_, x_square_);
    if (!square_) take(job_.square ? at_.x : at_.y, refs_, y_, y_inverse_, y_square_);
    const int64_t n = rows_.size(), m = square_ ? n : refs_.size();
    problem_ = {n,
                m,
                m,
                square_,
                lo_.data(),
                hi_.data(),
                square_ ? rows_.data() : refs_.data(),
                job_.euclidean ? x_square_.data() : nullptr,
                !job_.euclidean ? nullptr
                : square_       ? x_square_.data()
                                : y_square_.data(),
                false};
  }

  Pass<T> pass() const { return Pass<T>(kernels_, problem_, x_.data(), y(), job_.d, cut_.size, cut_.lanes); }
  const T* y() const { return square_ ? x_.data() : y_.data(); }

  // The reductions of the first pass, in the order of values_ (K, rows), and where the log-sum-exps stand among them.
  std::vector<Reduction<T>> reductions() const {
    auto of = [](int op, int side, double scale, int lower_of, int upper_of, double shift) {
      Reduction<T> r{};
      r.op = op, r.side = side, r.scale = static_cast<T>(scale);
      r.lower_of = lower_of, r.upper_of = upper_of, r.lower_shift = -shift, r.upper_shift = shift;
      return r;
    };
    const double positive = job_.scale[whole::POSITIVE], negative = job_.scale[whole::NEGATIVE], e = job_.epsilon;
    if (summed_ == whole::POSITIVE) return {of(LOGSUMEXP, NEGATIVES, negative, -1, -1, 0)};
    if (summed_ == whole::NEGATIVE) return {of(LOGSUMEXP, POSITIVES, positive, -1, -1, 0)};
    if (!job_.mined)
      return {of(LOGSUMEXP, NEGATIVES, negative, -1, -1, 0), of(LOGSUMEXP, POSITIVES, positive, -1, -1, 0)};
    return {of(MIN, POSITIVES, 1, -1, -1, 0), of(LOGSUMEXP, NEGATIVES, negative, 0, -1, e),
            of(MAX, NEGATIVES, 1, 0, -1, e), of(LOGSUMEXP, POSITIVES, positive, -1, 2, e)};
  }
  int sum_of(int side) const { return side == whole::POSITIVE ? (job_.mined ? 3 : 1) : (job_.mined ? 1 : 0); }
  T* values(int k) { return values_.data() + k * problem_.n; }

  // The second pass, of a loss that has one: softplus(scale z + the first pass' log-sum-exp) over the summed side.
  Reduction<T> sum() {
    Reduction<T> r{};
    r.op = SUM, r.side = summed_ == whole::POSITIVE ? POSITIVES : NEGATIVES, r.transform = SOFTPLUS;
    r.scale = static_cast<T>(job_.scale[summed_]), r.offset = values(0), r.lower_of = r.upper_of = -1;
    return r;
  }

  void reduce() {
    const bool list = job_.mined && (at_.dx || at_.dy) && cut_.slots;
    if (list) {
      live_count_.assign(cut_.slots, -1);
      live_entry_.resize(cut_.slots * cut_.capacity), live_z_.resize(cut_.slots * cut_.capacity);
    }
    Pass<T> forward = pass();
    const auto all = reductions();
    for (const Reduction<T>& r : all) forward.add(r);
    values_.resize(forward.rows_of_values() * problem_.n);
    forward.forward(threads_, values_.data(), nullptr, live(), list ? sum_of(whole::NEGATIVE) : -1);
    sums_.resize(problem_.n);
    if (summed_ == whole::NO_PAIR) return;
    Pass<T> second = pass();
    second.add(sum());
    second.forward(threads_, sums_.data(), nullptr, {}, -1);
  }

  LiveLists<T> live() {
    if (live_count_.empty()) return {};
    return {live_count_.data(), live_entry_.data(), live_z_.data(), cut_.capacity};
  }

  // Rows' losses, their sum, and what the two log-sum-exps' gradients are.
  void finish() {
    const int64_t n = problem_.n;
    const T none = -std::numeric_limits<T>::infinity();
    const T* upstream = static_cast<const T*>(at_.upstream);
    T* losses = static_cast<T*>(at_.loss);
    const bool each = job_.averaging == whole::NONE;
    if (losses && each) std::fill_n(losses, job_.n, T(0));
    for (auto& side : slope_) side.resize(n);
    const whole::Formula<T> formula = whole::formula_of<T>(job_);
    double loss = 0, part = 0, valid = 0, divides = 0;  // some rows at a time: equal ones would round alike
    for (int64_t i = 0; i < n; ++i) {
      whole::Row<T> row{};
      T* lse = row.gives.lse;
      for (int side : {whole::POSITIVE, whole::NEGATIVE})
        if (side != summed_) lse[side] = values(summed_ == whole::NO_PAIR ? sum_of(side) : 0)[i];
      if (job_.mined && lse[whole::POSITIVE] == none) lse[whole::NEGATIVE] = none;  // one decision for both sides
      whole::finish_row(formula, row, static_cast<T>(hi_[i] - lo_[i] - square_), true, sums_[i], T(0));
      part += row.loss, valid += row.valid, divides += row.divides;
      if (i % 16 == 15 || i == n - 1) loss += part, part = 0;
      if (losses && each) losses[rows_[i]] = row.loss;
      for (int side : {whole::POSITIVE, whole::NEGATIVE})
        slope_[side][i] = row.gives.slope[side] * (upstream ? upstream[rows_[i]] : T(1));
    }
    const double divisor = each || job_.averaging == whole::SUM ? 1 : std::max(divides, 1.0);
    if (losses && !each) *losses = static_cast<T>(loss / divisor);
    if (at_.share) *static_cast<T*>(at_.share) = static_cast<T>(valid / divisor);
    for (auto& side : slope_)
      for (T& slope : side) slope /= static_cast<T>(divisor);
  }

  void gradient() {
    const int64_t d = job_.d, n = problem_.n, m = problem_.m;
    T *dx = static_cast<T*>(at_.dx), *dy = static_cast<T*>(job_.square ? at_.dx : at_.dy);
    std::vector<T> own(dx ? n * d : 0), other(dy && !square_ ? m * d : 0);
    T *to_own = dx ? own.data() : nullptr, *to_other = other.empty() ? nullptr : other.data();
    Pass<T> backward = pass();
    auto all = reductions();
    if (summed_ == whole::NO_PAIR) {
      for (int side : {whole::POSITIVE, whole::NEGATIVE}) all[sum_of(side)].grad = slope_[side].data();
    } else {  // what the second pass gives to the log-sum-exp is the first one's gradient
      std::vector<T>& offset = slope_[1 - summed_];
      std::fill(offset.begin(), offset.end(), T(0));
      Reduction<T> r = sum();
      r.value = sums_.data(), r.grad = slope_[summed_].data(), r.grad_offset = offset.data();
      Pass<T> second = pass();
      second.add(r);
      second.backward(threads_, sums_.data(), to_own, to_other, {});
      all[0].grad = offset.data();
    }
    for (size_t k = 0, top = all.size(); k < all.size(); ++k) {
      all[k].value = values(k);
      if (all[k].op == LOGSUMEXP) all[k].top = values(top), all[k].rest = values(top + 1), top += 2;
      backward.add(all[k]);
    }
    backward.backward(threads_, values_.data(), to_own, to_other, live());
    auto scatter = [&](const std::vector<T>& g, const std::vector<T>& rows, const std::vector<T>& inverse,
                       const std::vector<int64_t>& order, T* to) {
      sorted_rows_backward(g.data(), rows.data(), job_.unit ? inverse.data() : nullptr, order.data(), order.size(), d,
                           to, threads_);
    };
    if (job_.one_pair && dx) std::fill_n(dx, job_.n * d, T(0));
    if (job_.one_pair && dy && !job_.square) std::fill_n(dy, job_.m * d, T(0));
    if (dx) scatter(own, x_, x_inverse_, rows_, dx);
    if (dy && !square_) scatter(other, y_, y_inverse_, refs_, dy);
  }

  // What is not finite in the embeddings, of samples that take no part as well, makes every result NaN.
  void spoil() const {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    auto raw = [&](const void* x, int64_t rows) { return all_finite(static_cast<const T*>(x), rows * job_.d); };
    const bool rest = !job_.one_pair || (raw(at_.x, job_.n) && (job_.square || raw(at_.y, job_.m)));
    if (all_finite(x_.data(), x_.size()) && all_finite(y_.data(), y_.size()) && rest) return;
    if (at_.loss) std::fill_n(static_cast<T*>(at_.loss), job_.averaging == whole::NONE ? job_.n : 1, nan);
    if (at_.dx) std::fill_n(static_cast<T*>(at_.dx), int64_t(job_.n) * job_.d, nan);
    if (at_.dy) std::fill_n(static_cast<T*>(at_.dy), int64_t(job_.m) * job_.d, nan);
  }

  Kernels<T> kernels_;
  whole::Job job_;
  whole::Tensors at_;
  Cut cut_;
  int threads_;
  int summed_;  // whole::summed_side
  bool square_ = false;
  std::vector<int64_t> rows_, refs_, lo_, hi_;  // who takes part, as the caller counts
  std::vector<T> x_, x_inverse_, x_square_, y_, y_inverse_, y_square_, values_, sums_, slope_[2];
  std::vector<int32_t> live_count_, live_entry_;
  std::vector<T> live_z_;
  Problem<T> problem_{};
};

}  // namespace flashpair
