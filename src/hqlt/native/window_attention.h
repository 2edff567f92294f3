// Window attention: softmax over the latest entries, and its gradient.
//
//     P_ij = exp(A_ij) / Σ_j exp(A_ij)      A_ij = scale · q_i·k_j      out_i = Σ_j P_ij v_j      over low_i ≤ j ≤ i
//     dP_ij = dout_i·v_j      dA_ij = P_ij (dP_ij − Σ_j P_ij dP_ij)
//     dv_j = Σ_i P_ij dout_i      dq_i = scale · Σ_j dA_ij k_j      dk_j = scale · Σ_i dA_ij q_i
//
// A task is a stretch of consecutive queries of one head. Its rows are copied side by side, padded with zeros to full
// vectors. L queries at a time are in the lanes, so that A is stored as [entries, L queries], and maximum, exponential and
// sum do not cross lanes. The backward pass uses only q, k and v and computes P again.
//
// With an expiry for each entry, query i also sees the entries j < low_i with i < expiry_j, in the same softmax. If other
// queries and keys are used for them, these have separate rows: A_ij = scale · far_q_i·far_k_j. A stretch holds the rows
// of all such entries that any of its queries sees.
//
// A weight of 0 does not keep NaN and infinity out of a product. So rows that are not finite are replaced by zeros when
// they are copied, and P_ij is set to NaN for the queries that see them. No other token is affected.

// eˣ for x ≤ 0: 2ⁿ times a polynomial in the remainder, |remainder| ≤ ½ ln 2. Subnormal results are 0; NaN stays NaN.
template <class T>
INLINE Lanes<T> exponential(Lanes<T> x) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;  // they wrap around for very small x
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

// Transposes an L × L block, in log₂ L rounds of interleaving its two halves.
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

// Contiguous rows of numbers, each `vectors` full vectors long.
template <class T>
struct Rows {
  Lanes<T>* at;
  int64_t vectors;
  T* row(int64_t i) const { return reinterpret_cast<T*>(at + i * vectors); }
};

// L rows from `first` on, transposed to [width, L rows], times a factor.
template <class T>
void into_lanes(Rows<T> rows, int64_t first, T factor, Lanes<T>* to) {
  for (int64_t n = 0; n < rows.vectors; ++n) {
    Lanes<T> block[L<T>];
    UNROLL for (int i = 0; i < L<T>; ++i) block[i] = factor * rows.at[(first + i) * rows.vectors + n];
    transpose<T>(block);
    UNROLL for (int i = 0; i < L<T>; ++i) to[n * L<T> + i] = block[i];
  }
}

// products[j] = Σ_d rows[j][d] · lanes[d]: the products of n rows with the L vectors in the lanes.
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
  constexpr int count = LANE_BYTES == 64 ? 16 / N : 8 / N;  // as many sums as fit into registers
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

// Query head i (of g·h) reads the entries of head i // g.
template <class T>
struct WindowAttention {
  int64_t b, t, l, queries, h, k, v, window, reach;  // queries: number of query heads, g·h; reach: most entries that a query sees
  T scale;
  const T *q, *key, *value;
  const uint8_t* resets;
  const int64_t* expiry;  // null if nothing is visible beyond the window
  const T *far_q, *far_key;
  T* out;
  const T* d_out;
  T *d_q, *d_key, *d_value, *d_far_q, *d_far_key;

  static int64_t whole(int64_t n) { return (n + L<T> - 1) / L<T>; }

  // Locations of a head's rows in [b, time, heads, ·], for all indices or for some.
  struct Places {
    int64_t first, stride;
    const int64_t* listed = nullptr;
    int64_t operator()(int64_t i) const { return first + (listed ? listed[i] : i) * stride; }
  };

  // The entries of one head that some query of a stretch sees beyond its window, for stretches from left to right. Entry
  // index[n] is visible to the queries from[n] … until[n] − 1 of the stretch.
  struct Far {
    std::vector<int64_t> index, from, until;
    int64_t left = 0;  // entries before this one have left the window

    // own: the index of the first query. low: the first entry within the window of each query, counted from `first`.
    void move_to(int64_t own, int64_t queries, int64_t first, const std::vector<int64_t>& low, const int64_t* expiry,
                 Places place) {
      for (; left < first + low[queries - 1]; ++left) index.push_back(left);
      from.clear(), until.clear();
      int64_t query = 0;
      for (const int64_t j : index) {  // all have left the window of the last query
        while (first + low[query] <= j) ++query;
        const int64_t end = std::clamp(expiry[place(j)], own, own + queries) - own;
        if (query >= end) continue;
        index[from.size()] = j, from.push_back(query), until.push_back(end);
      }
      index.resize(from.size());
    }
  };

  // Queries a … e − 1 of one head, and the entries first … first + pairs − 1 that they can see.
  struct Stretch {
    const WindowAttention& job;
    int64_t head, a, e, first, pairs;
    std::vector<int64_t> low;  // the first entry that each query sees, counted from `first`
    std::vector<uint8_t> bad_query, bad_pair;  // rows that are not finite
    bool bad = false;                          // whether there are any
    Lanes<T>* memory;
    Rows<T> q, key, value;
    Lanes<T>*query_lanes, *weights;
    const Far* far;  // null if there are none
    int64_t fars = 0;
    std::vector<uint8_t> bad_far_query, bad_far;
    Rows<T> far_q, far_key, far_value;
    Lanes<T>* far_lanes;

    Stretch(const WindowAttention& job, int64_t head, int64_t a, int64_t e, Far* beyond)
        : job(job), head(head), a(a), e(e), first(std::max<int64_t>(job.l - job.t + a - job.window + 1, 0)),
          pairs(job.l - job.t + e - first), low(whole(e - a) * L<T>, pairs), bad_query(low.size()), bad_pair(pairs),
          far(beyond) {
      const uint8_t* resets = job.resets ? job.resets + head / job.queries * job.l : nullptr;
      const int64_t own = pairs - (e - a);  // the entry of query a
      for (int64_t j = 0, begin = 0; j < pairs; ++j) {
        if (resets && resets[first + j]) begin = j;
        if (j >= own) low[j - own] = std::max(begin, j - job.window + 1);
      }
      const int64_t kv = whole(job.k), vv = whole(job.v), queries = whole(e - a) * L<T>;
      if (far) beyond->move_to(job.l - job.t + a, e - a, first, low, job.expiry, of_pairs()), fars = far->index.size();
      const int64_t twice = job.far_q && fars ? kv : 0;
      memory = scratch<T>(2 * (queries + pairs + fars) * (kv + vv) + (kv + vv) * L<T> + 2 * (pairs + fars) +
                          twice * (2 * queries + L<T>));
      q = rows(queries, kv), key = rows(pairs, kv), value = rows(pairs, vv);
      query_lanes = take(kv * L<T>), weights = take(pairs + fars);
      copy_in(q, job.q, of_queries(), a, e - a, queries, job.k, bad_query);
      copy_in(key, job.key, of_pairs(), first, pairs, pairs, job.k, bad_pair);
      copy_in(value, job.value, of_pairs(), first, pairs, pairs, job.v, bad_pair);
      if (fars) gather();
    }

    bool compares_others() const { return job.far_q; }
    void gather() {
      bad_far.resize(fars), bad_far_query.resize(low.size());
      far_key = rows(fars, key.vectors), far_value = rows(fars, value.vectors);
      copy_in(far_key, compares_others() ? job.far_key : job.key, of_fars(), 0, fars, fars, job.k, bad_far);
      copy_in(far_value, job.value, of_fars(), 0, fars, fars, job.v, bad_far);
      far_q = q, far_lanes = query_lanes;
      if (!compares_others()) return;
      const int64_t queries = low.size();
      far_q = rows(queries, q.vectors), far_lanes = take(q.vectors * L<T>);
      copy_in(far_q, job.far_q, of_queries(), a, e - a, queries, job.k, bad_far_query);
    }

    Lanes<T>* take(int64_t vectors) { return (memory += vectors) - vectors; }
    Rows<T> rows(int64_t n, int64_t vectors) { return {take(n * vectors), vectors}; }
    Rows<T> zeros(int64_t n, int64_t vectors) {
      const Rows<T> all = rows(n, vectors);
      std::fill_n(all.at, n * vectors, Lanes<T>{});
      return all;
    }

    Places places(int64_t time, int64_t heads) const {
      return {head / job.queries * time * heads + head % job.queries / (job.queries / heads), heads};
    }
    Places of_queries() const { return places(job.t, job.queries); }
    Places of_pairs() const { return places(job.l, job.h); }
    Places of_fars() const { return {of_pairs().first, job.h, far->index.data()}; }

    // n rows, padded with rows of zeros. Rows that are not finite are marked, and replaced by zeros.
    void copy_in(Rows<T> to, const T* from, Places place, int64_t begin, int64_t n, int64_t all, int64_t width,
                 std::vector<uint8_t>& marks) {
      for (int64_t i = 0; i < n; ++i) {
        const T* row = from + place(begin + i) * width;
        prefetch(row + 8 * place.stride * width, width);
        Lanes<T> zero = {};  // x − x is NaN if x is not finite
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

    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Index Indices __attribute__((vector_size(LANE_BYTES)));
    static constexpr T none = -std::numeric_limits<T>::infinity();

    // What L queries see: the entries begin … end − 1 within the window, then far_begin … far_end − 1 of the far ones.
    struct Seen {
      int64_t begin, end, far_begin = 0, far_end = 0;
      int64_t near() const { return end - begin; }
      int64_t far() const { return far_end - far_begin; }
      int64_t all() const { return near() + far(); }
    };

    // P for the L queries from `block` on: weights[n] is for the n-th entry that they see.
    Seen attend(int64_t block) {
      Indices lowest = {}, highest = {};
      Seen seen = {pairs, std::min(pairs - (e - a) + block + L<T>, pairs)};
      for (int i = 0; i < L<T>; ++i) {
        lowest[i] = Index(low[block + i]), highest[i] = Index(pairs - (e - a) + block + i);
        seen.begin = std::min(seen.begin, low[block + i]);
      }
      into_lanes(q, block, job.scale, query_lanes);
      multiply(key, seen.begin, seen.near(), job.k, query_lanes, weights);
      if (bad) mark(weights, &bad_pair[seen.begin], seen.near(), &bad_query[block]);

      Lanes<T> most = Lanes<T>{} + std::numeric_limits<T>::lowest(), total = {};
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        Lanes<T>& score = weights[j - seen.begin];
        const Index at = Index(j);
        score = ((lowest <= at) & (highest >= at)) ? score : none - Lanes<T>{};
        most = score > most ? score : most;
      }
      if (fars) most = attend_far(block, seen, most);
      const int64_t all = seen.all();
      for (int64_t j = 0; j < all; ++j) total += weights[j] = exponential<T>(weights[j] - most);
      const Lanes<T> inverse = total != 0 ? T(1) / total : Lanes<T>{};  // 0 in lanes without a query
      for (int64_t j = 0; j < all; ++j) weights[j] = weights[j] != 0 ? weights[j] * inverse : Lanes<T>{};
      return seen;
    }

    // Scores of the far entries, stored after those within the window. Returns the maximum of both.
    OUTLINE Lanes<T> attend_far(int64_t block, Seen& seen, Lanes<T> most) {
      const std::vector<int64_t>&from = far->from, &until = far->until;
      seen.far_end = std::lower_bound(from.begin(), from.end(), block + L<T>) - from.begin();
      while (seen.far_begin < seen.far_end && until[seen.far_begin] <= block) ++seen.far_begin;
      Lanes<T>* const scores = weights + seen.near();
      if (compares_others()) into_lanes(far_q, block, job.scale, far_lanes);
      multiply(far_key, seen.far_begin, seen.far(), job.k, far_lanes, scores);
      if (bad) mark(scores, bad_far.data() + seen.far_begin, seen.far(), &bad_far_query[block]);
      Indices query = {};
      for (int i = 0; i < L<T>; ++i) query[i] = Index(block + i);
      for (int64_t j = seen.far_begin; j < seen.far_end; ++j) {
        Lanes<T>& score = scores[j - seen.far_begin];
        const Index begin = Index(from[j]), end = Index(until[j]);
        score = ((query >= begin) & (query < end)) ? score : none - Lanes<T>{};
        most = score > most ? score : most;
      }
      return most;
    }

    // Sets the scores of non-finite rows to NaN.
    static void mark(Lanes<T>* scores, const uint8_t* bad_pair, int64_t n, const uint8_t* bad_query) {
      Lanes<T> sick = {};
      for (int i = 0; i < L<T>; ++i) sick[i] = bad_query[i] ? std::numeric_limits<T>::quiet_NaN() : T(0);
      for (int64_t j = 0; j < n; ++j)
        scores[j] += bad_pair[j] ? std::numeric_limits<T>::quiet_NaN() + Lanes<T>{} : sick;
    }

    void forward() {
      const Rows<T> out = rows(whole(e - a) * L<T>, value.vectors);
      const T* P = reinterpret_cast<T*>(weights);
      for (int64_t block = 0; block < e - a; block += L<T>) {
        const Seen seen = attend(block);
        combine<T>(P, 1, L<T>, value, seen.begin, seen.near(), out, block, L<T>, false);
        if (!fars) continue;
        combine<T>(P + seen.near() * L<T>, 1, L<T>, far_value, seen.far_begin, seen.far(), out, block, L<T>, true);
      }
      copy_out(out, job.out, of_queries(), a, e - a, job.v);
    }

    void backward() {
      const int64_t queries = whole(e - a) * L<T>;
      const Rows<T> d_out = rows(queries, value.vectors), d_q = rows(queries, q.vectors);
      const Rows<T> d_key = zeros(pairs, key.vectors), d_value = zeros(pairs, value.vectors);
      const Rows<T> d_far_key = zeros(fars, key.vectors), d_far_value = zeros(fars, value.vectors);
      const bool others = fars && compares_others();
      const Rows<T> d_far_q = others ? rows(queries, q.vectors) : d_q;
      Lanes<T>*d_out_lanes = take(value.vectors * L<T>), *d_weights = take(pairs + fars);
      copy_in(d_out, job.d_out, of_queries(), a, e - a, queries, job.v, bad_query);
      const T *P = reinterpret_cast<T*>(weights), *dA = reinterpret_cast<T*>(d_weights);
      for (int64_t block = 0; block < e - a; block += L<T>) {
        const Seen seen = attend(block);
        const int64_t begin = seen.begin, n = seen.near(), m = seen.far(), all = seen.all();
        into_lanes(d_out, block, T(1), d_out_lanes);
        multiply(value, begin, n, job.v, d_out_lanes, d_weights);
        if (fars) multiply(far_value, seen.far_begin, m, job.v, d_out_lanes, d_weights + n);
        Lanes<T> mean = {};
        for (int64_t j = 0; j < all; ++j) mean += weights[j] * d_weights[j];
        for (int64_t j = 0; j < all; ++j)
          d_weights[j] = weights[j] != 0 ? job.scale * weights[j] * (d_weights[j] - mean) : Lanes<T>{};
        combine<T>(P, L<T>, 1, d_out, block, L<T>, d_value, begin, n, true);
        combine<T>(dA, L<T>, 1, q, block, L<T>, d_key, begin, n, true);
        combine<T>(dA, 1, L<T>, key, begin, n, d_q, block, L<T>, false);
        if (!fars) continue;
        const T *far_P = P + n * L<T>, *far_dA = dA + n * L<T>;
        combine<T>(far_P, L<T>, 1, d_out, block, L<T>, d_far_value, seen.far_begin, m, true);
        combine<T>(far_dA, L<T>, 1, far_q, block, L<T>, d_far_key, seen.far_begin, m, true);
        combine<T>(far_dA, 1, L<T>, far_key, seen.far_begin, m, d_far_q, block, L<T>, !others);
      }
      copy_out(d_q, job.d_q, of_queries(), a, e - a, job.k);
      add_out(d_key, job.d_key, of_pairs(), first, pairs, job.k);
      add_out(d_value, job.d_value, of_pairs(), first, pairs, job.v);
      if (!fars) return;
      if (others) copy_out(d_far_q, job.d_far_q, of_queries(), a, e - a, job.k);
      add_out(d_far_key, others ? job.d_far_key : job.d_key, of_fars(), 0, fars, job.k);
      add_out(d_far_value, job.d_value, of_fars(), 0, fars, job.v);
    }
  };

  // Stretches at least as long as the window, so that even stretches have disjoint entries, and so do odd ones.
  int64_t stretch() const { return std::min(std::max<int64_t>(128, whole(window) * L<T>), t); }
  int64_t stretches() const { return (t + stretch() - 1) / stretch(); }
  Stretch at(int64_t head, int64_t i, Far* far = nullptr) const {
    return {*this, head, i * stretch(), std::min((i + 1) * stretch(), t), far};
  }

  // work(stretch) for the stretches from `begin` to `end` of all queries that read a KV head, one after the other.
  template <class Work>
  void visit(int64_t head, int64_t begin, int64_t end, const Work& work) const {
    const int64_t g = queries / h;
    Far far;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t query = head * g; query < (head + 1) * g; ++query) work(at(query, i, expiry ? &far : nullptr));
  }

  // Part p of all KV heads' stretches belongs to jobs[p]. Each searches for its far entries from the first entry on.
  template <class Work>
  static void visit_parts(int threads, const std::vector<WindowAttention>& jobs, const Work& work) {
    const int64_t parts = jobs.size(), heads = jobs[0].b * jobs[0].h, stretches = jobs[0].stretches();
    Pool::run(threads, heads * parts, [&](int64_t task) {
      const int64_t part = task % parts;
      jobs[part].visit(task / parts, part * stretches / parts, (part + 1) * stretches / parts, work);
    });
  }
  // As many parts as give every thread equal work.
  int64_t parts(int threads) const {
    const int64_t heads = b * h;
    return heads >= 4 * threads ? 1 : std::min(threads / std::gcd<int64_t, int64_t>(heads, threads), stretches());
  }
  int threads_of(int threads) const { return threads_for(threads, b * queries * t * reach * (k + v)); }
};

template <class T>
void window_attention_forward(int threads, const int64_t* n, double scale, void* const* x) {
  WindowAttention<T> job = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], T(scale)};
  from(x, job.q, job.key, job.value, job.resets, job.expiry, job.far_q, job.far_key, job.out);
  threads = job.threads_of(threads);
  const auto forward = [](auto&& stretch) { stretch.forward(); };
  if (job.expiry)
    return job.visit_parts(threads, std::vector<WindowAttention<T>>(job.parts(threads), job), forward);
  const int64_t stretches = job.stretches(), heads = job.b * job.queries;
  Pool::run(threads, heads * stretches, [&](int64_t task) { forward(job.at(task / stretches, task % stretches)); });
}

// All stretches of a head may add to the gradients of the same entries. So each part has its own gradients, which are
// summed at the end.
template <class T, class Work>
void window_attention_backward_beyond(int threads, const WindowAttention<T>& job, const Work& backward) {
  const int64_t keys = job.h * job.k, values = job.h * job.v, rows = job.b * job.l, parts = job.parts(threads);
  const int64_t size = rows * (2 * keys + values);
  std::vector<WindowAttention<T>> jobs(parts, job);
  std::vector<T> gradients((parts - 1) * size);
  for (int64_t part = 1; part < parts; ++part) {
    T* const own = gradients.data() + (part - 1) * size;
    jobs[part].d_value = own, jobs[part].d_key = own + rows * values;
    if (job.far_q) jobs[part].d_far_key = jobs[part].d_key + rows * keys;
  }
  job.visit_parts(threads, jobs, backward);
  const auto add = [](T* to, const T* from, int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n; ++i) to[i] += from[i];
  };
  if (parts > 1)
    Pool::run(threads, rows, [&](int64_t row) {
      for (int64_t part = 1; part < parts; ++part) {
        add(job.d_value, jobs[part].d_value, row * values, values);
        add(job.d_key, jobs[part].d_key, row * keys, keys);
        if (job.far_q) add(job.d_far_key, jobs[part].d_far_key, row * keys, keys);
      }
    });
}

// The caller fills all gradients except d_q with zeros.
template <class T>
void window_attention_backward(int threads, const int64_t* n, double scale, void* const* x) {
  WindowAttention<T> job = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], T(scale)};
  from(x, job.q, job.key, job.value, job.resets, job.expiry, job.far_q, job.far_key, job.d_out, job.d_q, job.d_key,
       job.d_value, job.d_far_q, job.d_far_key);
  threads = job.threads_of(threads);
  const auto backward = [](auto&& stretch) { stretch.backward(); };
  if (job.expiry) return window_attention_backward_beyond<T>(threads, job, backward);
  const int64_t stretches = job.stretches(), heads = job.b * job.h;
  if (heads % threads == 0 || heads >= 4 * threads)
    return Pool::run(threads, heads, [&](int64_t head) { job.visit(head, 0, stretches, backward); });
  for (int64_t odd = 0; odd < 2; ++odd) {
    const int64_t half = (stretches + 1 - odd) / 2;
    Pool::run(threads, heads * half, [&](int64_t task) {
      const int64_t i = 2 * (task % half) + odd;
      job.visit(task / half, i, i + 1, backward);
    });
  }
}
