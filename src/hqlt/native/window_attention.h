// Window attention: softmax over the latest pairs, and its gradient.
//
//     P_ij = exp(A_ij) / Σ_j exp(A_ij)      A_ij = scale · q_i·k_j      out_i = Σ_j P_ij v_j      over low_i ≤ j ≤ i
//     dP_ij = dout_i·v_j      dA_ij = P_ij (dP_ij − Σ_j P_ij dP_ij)
//     dv_j = Σ_i P_ij dout_i      dq_i = scale · Σ_j dA_ij k_j      dk_j = scale · Σ_i dA_ij q_i
//
// A task is a stretch of queries of one head. Its rows are copied side by side, filled up with zeros to whole vectors.
// L queries at a time lie in the lanes, so that A is kept as [pairs, L queries] and maximum, exponential and sum run
// without crossing lanes. The backward pass keeps q, k and v alone and computes P again.
//
// A weight of 0 does not keep NaN and infinity out of a product. So rows that hold one become zeros when they are copied,
// and what sees them, P_ij of a pair within reach, becomes NaN: it reaches no token that cannot see it.

// eˣ for x ≤ 0: 2ⁿ times a polynomial in the rest, |rest| ≤ ½ ln 2. Below the smallest normal number it is 0; NaN stays.
template <class T>
INLINE Lanes<T> exponential(Lanes<T> x) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits BitLanes __attribute__((vector_size(LANE_BYTES)));
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52, degree = single ? 7 : 13;
  constexpr T rounder = single ? T(12582912) : T(6755399441055744);  // 1.5 · 2^mantissa: its last bits hold n
  constexpr T ln2_high = single ? T(0.693359375) : T(0x1.62e42fee00000p-1);
  constexpr T ln2_low = single ? T(-2.12194440e-4) : T(0x1.a39ef35793c76p-33);
  const Lanes<T> shifted = x * T(1.44269504088896340736) + rounder;
  const Lanes<T> n = shifted - rounder, rest = (x - n * ln2_high) - n * ln2_low;
  Lanes<T> power = Lanes<T>{} + T(1);
  UNROLL for (int i = degree; i > 0; --i) power = T(1) + power * rest * T(1.0 / i);
  const Lanes<T> scaled = (Lanes<T>)((BitLanes)power + ((BitLanes)shifted << mantissa));
  return x <= (single ? T(-87) : T(-708)) ? Lanes<T>{} : scaled + (x - x);
}

// Exchanges rows and lanes of an L × L block: log₂ L rounds of zipping the two halves together.
template <class T, int... I>
INLINE void zip(const Lanes<T>* x, Lanes<T>* y, std::integer_sequence<int, I...>) {
  constexpr int N = L<T>;
  UNROLL for (int i = 0; i < N / 2; ++i) {
    y[2 * i] = __builtin_shufflevector(x[i], x[i + N / 2], (I % 2 ? N + I / 2 : I / 2)...);
    y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + N / 2], (I % 2 ? N + N / 2 + I / 2 : N / 2 + I / 2)...);
  }
}
template <class T>
INLINE void transpose(Lanes<T> (&x)[L<T>]) {
  Lanes<T> y[L<T>];
  for (int rounds = 1; rounds < L<T>; rounds *= 2) {
    zip<T>(x, y, std::make_integer_sequence<int, L<T>>());
    UNROLL for (int i = 0; i < L<T>; ++i) x[i] = y[i];
  }
}

// Rows of numbers side by side, each `vectors` whole vectors long.
template <class T>
struct Rows {
  Lanes<T>* at;
  int64_t vectors;
  T* row(int64_t i) const { return reinterpret_cast<T*>(at + i * vectors); }
};

// L rows from `first` on, exchanged into [width, L rows], times a factor.
template <class T>
void into_lanes(Rows<T> rows, int64_t first, T factor, Lanes<T>* to) {
  for (int64_t n = 0; n < rows.vectors; ++n) {
    Lanes<T> block[L<T>];
    UNROLL for (int i = 0; i < L<T>; ++i) block[i] = factor * rows.at[(first + i) * rows.vectors + n];
    transpose<T>(block);
    UNROLL for (int i = 0; i < L<T>; ++i) to[n * L<T> + i] = block[i];
  }
}

// products[j] = Σ_d rows[j][d] · lanes[d]: the products of n rows with the L vectors that lie in the lanes.
template <class T, int count>
INLINE void multiply_rows(const T* row, int64_t stride, int64_t width, const Lanes<T>* lanes, Lanes<T>* products) {
  Lanes<T> sum[count] = {};
  for (int64_t d = 0; d < width; ++d)
    UNROLL for (int i = 0; i < count; ++i) sum[i] += lanes[d] * row[i * stride + d];
  UNROLL for (int i = 0; i < count; ++i) products[i] = sum[i];
}
template <class T>
void multiply(Rows<T> rows, int64_t first, int64_t n, int64_t width, const Lanes<T>* lanes, Lanes<T>* products) {
  const int64_t stride = rows.vectors * L<T>;
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) multiply_rows<T, 8>(rows.row(first + j), stride, width, lanes, products + j);
  for (; j < n; ++j) multiply_rows<T, 1>(rows.row(first + j), stride, width, lanes, products + j);
}

// to[i] = (to[i] +) Σ_j weight(i, j) · rows[j] for m rows i and n rows j, with weight(i, j) = weights[i · step_i + j · step_j].
template <class T, int count, int N>
INLINE void combine_rows(const T* weights, int64_t step_i, int64_t step_j, const Lanes<T>* rows, int64_t vectors,
                         int64_t n, Lanes<T>* to, bool add) {
  Lanes<T> sum[count][N] = {};
  for (int64_t j = 0; j < n; ++j)
    UNROLL for (int i = 0; i < count; ++i) {
      const Lanes<T> weight = broadcast(weights + i * step_i + j * step_j);
      UNROLL for (int c = 0; c < N; ++c) sum[i][c] += weight * rows[j * vectors + c];
    }
  UNROLL for (int i = 0; i < count; ++i)
    UNROLL for (int c = 0; c < N; ++c) to[i * vectors + c] = add ? to[i * vectors + c] + sum[i][c] : sum[i][c];
}
template <class T, int count, int N>
INLINE int64_t combine_blocks(const T* weights, int64_t step_i, int64_t step_j, const Lanes<T>* rows, int64_t vectors,
                              int64_t n, Lanes<T>* to, int64_t i, int64_t m, bool add) {
  for (; i + count <= m; i += count)
    combine_rows<T, count, N>(weights + i * step_i, step_i, step_j, rows, vectors, n, to + i * vectors, add);
  return i;
}
template <class T, int N>
void combine_columns(const T* weights, int64_t step_i, int64_t step_j, const Lanes<T>* rows, int64_t vectors, int64_t n,
                     Lanes<T>* to, int64_t m, bool add) {
  constexpr int count = LANE_BYTES == 64 ? 16 / N : 8 / N;  // as many sums as there are registers for
  int64_t i = combine_blocks<T, std::min(count, 8), N>(weights, step_i, step_j, rows, vectors, n, to, 0, m, add);
  combine_blocks<T, 1, N>(weights, step_i, step_j, rows, vectors, n, to, i, m, add);
}
template <class T>
void combine(const T* weights, int64_t step_i, int64_t step_j, Rows<T> rows, int64_t first, int64_t n,  //
             Rows<T> to, int64_t first_to, int64_t m, bool add) {
  constexpr int wide = LANE_BYTES == 64 ? 4 : 2;
  const int64_t vectors = rows.vectors;
  const Lanes<T>* row = rows.at + first * vectors;
  Lanes<T>* target = to.at + first_to * vectors;
  int64_t c = 0;
  for (; c + wide <= vectors; c += wide)
    combine_columns<T, wide>(weights, step_i, step_j, row + c, vectors, n, target + c, m, add);
  for (; c + 2 <= vectors; c += 2)
    combine_columns<T, 2>(weights, step_i, step_j, row + c, vectors, n, target + c, m, add);
  if (c < vectors) combine_columns<T, 1>(weights, step_i, step_j, row + c, vectors, n, target + c, m, add);
}

// Query head i, of all g·h, reads the pairs of head i // g.
template <class T>
struct WindowAttention {
  int64_t b, t, l, queries, h, k, v, window;  // queries: their heads, g·h
  T scale;
  const T *q, *key, *value;
  const uint8_t* resets;
  T* out;
  const T* d_out;
  T *d_q, *d_key, *d_value;

  static int64_t whole(int64_t n) { return (n + L<T> - 1) / L<T>; }

  // Queries a … e − 1 of one head, and the pairs first … first + pairs − 1 that they can reach.
  struct Stretch {
    const WindowAttention& job;
    int64_t head, a, e, first, pairs;
    std::vector<int64_t> low;  // the first pair that each query reaches, counted from `first`
    std::vector<uint8_t> bad_query, bad_pair;  // rows that are not finite
    bool bad = false;                          // whether there is one
    Lanes<T>* memory;
    Rows<T> q, key, value;
    Lanes<T>*query_lanes, *weights;

    Stretch(const WindowAttention& job, int64_t head, int64_t a, int64_t e)
        : job(job), head(head), a(a), e(e), first(std::max<int64_t>(job.l - job.t + a - job.window + 1, 0)),
          pairs(job.l - job.t + e - first), low(whole(e - a) * L<T>, pairs), bad_query(low.size()), bad_pair(pairs) {
      const uint8_t* resets = job.resets ? job.resets + head / job.queries * job.l : nullptr;
      const int64_t own = pairs - (e - a);  // the pair of query a
      for (int64_t j = 0, begin = 0; j < pairs; ++j) {
        if (resets && resets[first + j]) begin = j;
        if (j >= own) low[j - own] = std::max(begin, j - job.window + 1);
      }
      const int64_t kv = whole(job.k), vv = whole(job.v), queries = whole(e - a) * L<T>;
      memory = scratch<T>(2 * (queries + pairs) * (kv + vv) + (kv + vv) * L<T> + 2 * pairs);
      q = rows(queries, kv), key = rows(pairs, kv), value = rows(pairs, vv);
      query_lanes = take(kv * L<T>), weights = take(pairs);
      copy_in(q, job.q, of_queries(), a, e - a, queries, job.k, bad_query);
      copy_in(key, job.key, of_pairs(), first, pairs, pairs, job.k, bad_pair);
      copy_in(value, job.value, of_pairs(), first, pairs, pairs, job.v, bad_pair);
    }

    Lanes<T>* take(int64_t vectors) { return (memory += vectors) - vectors; }
    Rows<T> rows(int64_t n, int64_t vectors) { return {take(n * vectors), vectors}; }

    // Where this head's rows lie in [b, time, heads, ·].
    struct Places {
      int64_t first, stride;
      int64_t operator()(int64_t i) const { return first + i * stride; }
    };
    Places places(int64_t time, int64_t heads) const {
      return {head / job.queries * time * heads + head % job.queries / (job.queries / heads), heads};
    }
    Places of_queries() const { return places(job.t, job.queries); }
    Places of_pairs() const { return places(job.l, job.h); }

    // n rows, and rows of zeros to fill up. Those that are not finite are marked, and zeros.
    void copy_in(Rows<T> to, const T* from, Places place, int64_t begin, int64_t n, int64_t all, int64_t width,
                 std::vector<uint8_t>& marks) {
      for (int64_t i = 0; i < n; ++i) {
        const T* row = from + place(begin + i) * width;
        prefetch(row + 8 * place.stride * width, width);
        Lanes<T> zero = {};  // x − x is NaN where x is not finite
        for (int64_t j = 0; j < to.vectors; ++j) {
          const Lanes<T> x = to.at[i * to.vectors + j] = load_until(row, j * L<T>, width);
          zero += x - x;
        }
        if (sum_of<T>(zero) == 0) continue;
        marks[i] = 1, bad = true;
        std::fill_n(to.at + i * to.vectors, to.vectors, Lanes<T>{});
      }
      std::fill_n(to.at + n * to.vectors, (all - n) * to.vectors, Lanes<T>{});
    }
    void copy_out(Rows<T> from, T* to, Places place, int64_t begin, int64_t n, int64_t width) const {
      for (int64_t i = 0; i < n; ++i) {
        T* row = to + place(begin + i) * width;
        prefetch_to_write(row + 8 * place.stride * width, width);
        for (int64_t j = 0; j < from.vectors; ++j) store_until(row, j * L<T>, width, from.at[i * from.vectors + j]);
      }
    }
    void add_out(Rows<T> from, T* to, Places place, int64_t begin, int64_t n, int64_t width) const {
      for (int64_t i = 0; i < n; ++i) {
        T* row = to + place(begin + i) * width;
        prefetch_to_write(row + 8 * place.stride * width, width);
        for (int64_t j = 0; j < from.vectors; ++j)
          store_until(row, j * L<T>, width, load_until(row, j * L<T>, width) + from.at[i * from.vectors + j]);
      }
    }

    // P for the L queries from `block` on: weights[j − begin], begin ≤ j < end.
    void attend(int64_t block, int64_t& begin, int64_t& end) {
      using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
      typedef Index Indices __attribute__((vector_size(LANE_BYTES)));
      Indices lowest = {}, highest = {};
      begin = pairs, end = std::min(pairs - (e - a) + block + L<T>, pairs);
      for (int i = 0; i < L<T>; ++i) {
        lowest[i] = Index(low[block + i]), highest[i] = Index(pairs - (e - a) + block + i);
        begin = std::min(begin, low[block + i]);
      }
      into_lanes(q, block, job.scale, query_lanes);
      multiply(key, begin, end - begin, job.k, query_lanes, weights);
      if (bad) mark(block, begin, end);

      constexpr T none = -std::numeric_limits<T>::infinity();
      Lanes<T> most = Lanes<T>{} + std::numeric_limits<T>::lowest(), total = {};
      for (int64_t j = begin; j < end; ++j) {
        Lanes<T>& score = weights[j - begin];
        const Index at = Index(j);
        score = ((lowest <= at) & (highest >= at)) ? score : none - Lanes<T>{};
        most = score > most ? score : most;
      }
      for (int64_t j = 0; j < end - begin; ++j) total += weights[j] = exponential<T>(weights[j] - most);
      const Lanes<T> inverse = total != 0 ? T(1) / total : Lanes<T>{};  // 0: lanes without a query
      for (int64_t j = 0; j < end - begin; ++j) weights[j] = weights[j] != 0 ? weights[j] * inverse : Lanes<T>{};
    }

    // NaN for the scores of what is not finite.
    void mark(int64_t block, int64_t begin, int64_t end) {
      Lanes<T> sick = {};
      for (int i = 0; i < L<T>; ++i) sick[i] = bad_query[block + i] ? std::numeric_limits<T>::quiet_NaN() : T(0);
      for (int64_t j = begin; j < end; ++j)
        weights[j - begin] += bad_pair[j] ? std::numeric_limits<T>::quiet_NaN() + Lanes<T>{} : sick;
    }

    void forward() {
      const Rows<T> out = rows(whole(e - a) * L<T>, value.vectors);
      for (int64_t block = 0, begin, end; block < e - a; block += L<T>) {
        attend(block, begin, end);
        combine<T>(reinterpret_cast<T*>(weights), 1, L<T>, value, begin, end - begin, out, block, L<T>, false);
      }
      copy_out(out, job.out, of_queries(), a, e - a, job.v);
    }

    void backward() {
      const int64_t queries = whole(e - a) * L<T>;
      const Rows<T> d_out = rows(queries, value.vectors), d_q = rows(queries, q.vectors);
      const Rows<T> d_key = rows(pairs, key.vectors), d_value = rows(pairs, value.vectors);
      Lanes<T>*d_out_lanes = take(value.vectors * L<T>), *d_weights = take(pairs);
      copy_in(d_out, job.d_out, of_queries(), a, e - a, queries, job.v, bad_query);
      std::fill_n(d_key.at, pairs * d_key.vectors, Lanes<T>{});
      std::fill_n(d_value.at, pairs * d_value.vectors, Lanes<T>{});
      const T *P = reinterpret_cast<T*>(weights), *dA = reinterpret_cast<T*>(d_weights);
      for (int64_t block = 0, begin, end; block < e - a; block += L<T>) {
        attend(block, begin, end);
        const int64_t n = end - begin;
        into_lanes(d_out, block, T(1), d_out_lanes);
        multiply(value, begin, n, job.v, d_out_lanes, d_weights);
        Lanes<T> mean = {};
        for (int64_t j = 0; j < n; ++j) mean += weights[j] * d_weights[j];
        for (int64_t j = 0; j < n; ++j)
          d_weights[j] = weights[j] != 0 ? job.scale * weights[j] * (d_weights[j] - mean) : Lanes<T>{};
        combine<T>(P, L<T>, 1, d_out, block, L<T>, d_value, begin, n, true);
        combine<T>(dA, L<T>, 1, q, block, L<T>, d_key, begin, n, true);
        combine<T>(dA, 1, L<T>, key, begin, n, d_q, block, L<T>, false);
      }
      copy_out(d_q, job.d_q, of_queries(), a, e - a, job.k);
      add_out(d_key, job.d_key, of_pairs(), first, pairs, job.k);
      add_out(d_value, job.d_value, of_pairs(), first, pairs, job.v);
    }
  };

  // Stretches of at least a window: the pairs of the even ones are then disjoint, and those of the odd ones.
  int64_t stretch() const { return std::min(std::max<int64_t>(128, whole(window) * L<T>), t); }
  int64_t stretches() const { return (t + stretch() - 1) / stretch(); }
  Stretch at(int64_t head, int64_t i) const { return {*this, head, i * stretch(), std::min((i + 1) * stretch(), t)}; }
};

template <class T>
void window_attention_forward(int threads, const int64_t* n, double scale, void* const* x) {
  WindowAttention<T> job = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], T(scale)};
  from(x, job.q, job.key, job.value, job.resets, job.out);
  const int64_t stretches = job.stretches(), heads = job.b * job.queries;
  threads = threads_for(threads, heads * job.t * std::min(job.window, job.l) * (job.k + job.v));
  Pool::run(threads, heads * stretches, [&](int64_t task) { job.at(task / stretches, task % stretches).forward(); });
}

// d_key and d_value come filled with zeros.
template <class T>
void window_attention_backward(int threads, const int64_t* n, double scale, void* const* x) {
  WindowAttention<T> job = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], T(scale)};
  from(x, job.q, job.key, job.value, job.resets, job.d_out, job.d_q, job.d_key, job.d_value);
  const int64_t stretches = job.stretches(), heads = job.b * job.h, g = job.queries / job.h;
  threads = threads_for(threads, heads * g * job.t * std::min(job.window, job.l) * (job.k + job.v));
  const auto group = [&](int64_t head, int64_t i) {  // adds to the same pairs: one after the other
    for (int64_t query = head * g; query < (head + 1) * g; ++query) job.at(query, i).backward();
  };
  if (heads % threads == 0 || heads >= 4 * threads)
    return Pool::run(threads, heads, [&](int64_t head) {
      for (int64_t i = 0; i < stretches; ++i) group(head, i);
    });
  for (int64_t odd = 0; odd < 2; ++odd) {
    const int64_t half = (stretches + 1 - odd) / 2;
    Pool::run(threads, heads * half, [&](int64_t task) { group(task / half, 2 * (task % half) + odd); });
  }
}
