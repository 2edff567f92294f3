// The delta rule.
//
//     r_t = v_t − W_{t−1}ᵀ k_t      W_t = W_{t−1} + k_t ⊗ β_t r_t      out_t = scale · W_tᵀ q_t
//
// The columns of W are independent, so each slice of columns is a task: it stays in the L1 cache, and one pass over it
// writes and reads two tokens and predicts the next two. The errors r are saved for the backward pass.
//
// Backward, with G_t the gradient of W_t and du_t = G_tᵀ k_t that of β_t r_t:
//
//     G_t = G_{t+1} − k_{t+1} ⊗ dv_{t+1} + scale · q_t ⊗ dout_t
//     dv_t = β_t du_t      dβ_t = du_t · r_t      dq_t = scale · W_t dout_t      dk_t = β_t G_t r_t − W_{t−1} dv_t
//
// Given r and dv, every step above only adds products to a matrix, so that W is rebuilt forwards from the initial state:
// only r is saved, and nothing is inverted. One sweep runs over G backwards in time, then one over the transpose of W
// forwards, so that the sums over v (dq, dk) are elementwise over lanes; G r_t takes one horizontal sum per row.
//
// A token that is not live is treated as zeros. If g > 1 queries read a matrix, it is written token by token, and all
// queries but the first take an additional pass.

template <class T>
struct DeltaRule {
  int64_t b, t, h, k, v, g;
  T scale;
  const T* zeros;  // as many as the larger of k and v; null if all tokens are live
  const T *q, *key, *value, *beta, *state;
  Marks marks;
  T *errors, *out, *final_state;
  const T *d_out, *d_final;
  T *d_q, *d_key, *d_value, *d_beta, *d_state;

  // Two tokens per pass. Both are predicted before either is written; the second is then corrected by the first's write.
  template <int N>
  void forward(int64_t head, int64_t slice) const {
    const Head at(head, t, h, g, marks);
    const Columns<T, N> columns{v, slice};
    Slice<T, N> W{columns, k, scratch<T>(k * N)};
    W.read(state + head * k * v);

    Pass<T, N, read, read> look;
    Pass<T, N, write, read, read, read> one;
    Pass<T, N, write, read, write, read, read, read> two;
    Pass<T, N, read> more;
    const T* next[2] = {key_of(at, 0), key_of(at, t > 1)};
    look.w[0] = next[0], look.w[1] = next[1];
    look(W.M, k);
    for (int64_t i = 0; i < t;) {
      const bool pair = g == 1 && i + 1 < t && !at.reset(i + 1);
      const int64_t after = i + 1 + pair, first = at.query(i), second = at.query(i + pair);
      const T* now[2] = {next[0], next[1]};
      next[0] = key_of(at, after < t ? after : i), next[1] = key_of(at, after + 1 < t ? after + 1 : i);
      for (int64_t soon = after + 2; soon < after + 4 && soon < t; ++soon) {
        const int64_t token = at.token(soon);
        prefetch(q + at.query(soon) * k, g * k), prefetch(key + token * k, k), prefetch(value + token * v, v);
        prefetch_to_write(out + at.query(soon) * v, g * v);
        if (errors) prefetch_to_write(errors + token * v, v);
      }
      if (at.reset(i)) {
        W.clear();
        UNROLL for (int n = 0; n < N; ++n) look.x[0][n] = look.x[1][n] = Lanes<T>{};
      }
      Lanes<T> correction[N];
      correct(columns, at, i, look.x[0], correction);
      if (pair) {
        const T overlap = dot(now[0], now[1], k);
        UNROLL for (int n = 0; n < N; ++n) {
          two.x[0][n] = correction[n];
          look.x[1][n] += overlap * correction[n];
        }
        correct(columns, at, i + 1, look.x[1], two.x[2]);
        two.w[0] = now[0], two.w[1] = q + first * k, two.w[2] = now[1], two.w[3] = q + second * k;
        two.w[4] = next[0], two.w[5] = next[1];
        two(W.M, k);
        UNROLL for (int n = 0; n < N; ++n) {
          columns.store(out + first * v, n, scale * two.x[1][n]);
          columns.store(out + second * v, n, scale * two.x[3][n]);
          look.x[0][n] = two.x[4][n], look.x[1][n] = two.x[5][n];
        }
      } else {
        UNROLL for (int n = 0; n < N; ++n) one.x[0][n] = correction[n];
        one.w[0] = now[0], one.w[1] = q + first * k, one.w[2] = next[0], one.w[3] = next[1];
        one(W.M, k);
        UNROLL for (int n = 0; n < N; ++n) {
          columns.store(out + first * v, n, scale * one.x[1][n]);
          look.x[0][n] = one.x[2][n], look.x[1][n] = one.x[3][n];
        }
        for (int64_t query = first + 1; query < first + g; ++query) {
          more.w[0] = q + query * k;
          more(W.M, k);
          UNROLL for (int n = 0; n < N; ++n) columns.store(out + query * v, n, scale * more.x[0][n]);
        }
      }
      i = after;
    }
    W.write(final_state + head * k * v);
  }

  // Accumulators of one task for sums over all columns: dβ, and the part β G r of dk.
  struct Sums {
    T *d_key, *d_beta;
  };

  // Sweep backwards in time over columns of G: dv, the gradient of the initial state, and these columns' part of the sums.
  template <int N>
  void backward_columns(int64_t head, int64_t slice, Sums sums, bool first) const {
    const Head at(head, t, h, g, marks);
    const Columns<T, N> columns{v, slice};
    Slice<T, N> G{columns, k, scratch<T>(k * N)};
    G.read(d_final + head * k * v);

    Pass<T, N, write> more;
    Lanes<T> own[N], d_error[N] = {}, error[N], d_read[N];
    UNROLL for (int n = 0; n < N; ++n) own[n] = columns.own(n);
    for (int64_t i = t - 1; i >= 0; --i) {
      const bool last = i + 1 == t || at.reset(i + 1);  // last of its segment: the next token's key is not used
      const int64_t now = at.token(i), query = at.query(i), soon = at.token(i > 1 ? i - 2 : i);
      const T *key_now = key_of(at, i), *key_later = key_of(at, last ? i : i + 1), *q_now = q + query * k;
      const T strength = beta_of(at, i);
      prefetch(q + soon * g * k, g * k), prefetch(key + soon * k, k);
      prefetch(d_out + soon * g * v, g * v), prefetch(errors + soon * v, v);
      prefetch_to_write(d_value + soon * v, v), prefetch_to_write(sums.d_key + soon * k, k);
      if (last && i + 1 < t) {
        G.clear();
        UNROLL for (int n = 0; n < N; ++n) d_error[n] = Lanes<T>{};
      }
      for (int64_t other = query + 1; other < query + g; ++other) {
        UNROLL for (int n = 0; n < N; ++n) more.x[0][n] = scale * columns.load(d_out + other * v, n);
        more.w[0] = q + other * k;
        more(G.M, k);
      }
      UNROLL for (int n = 0; n < N; ++n) {
        d_read[n] = scale * columns.load(d_out + query * v, n);
        error[n] = own[n] * columns.load(errors + now * v, n);
      }
      Lanes<T> d_write[N] = {};
      for (int64_t row = 0; row < k; row += L<T>) {
        const int64_t rows = std::min<int64_t>(L<T>, k - row);
        Lanes<T> products[L<T>];
        for (int64_t j = rows; j < L<T>; ++j) products[j] = Lanes<T>{};
        for (int64_t j = 0; j < rows; ++j) {
          Lanes<T>* M = G.M + (row + j) * N;
          const Lanes<T> later = broadcast(key_later + row + j), reader = broadcast(q_now + row + j);
          const Lanes<T> written = broadcast(key_now + row + j);
          Lanes<T> product = {};
          UNROLL for (int n = 0; n < N; ++n) {
            const Lanes<T> m = M[n] - d_error[n] * later + d_read[n] * reader;
            d_write[n] += m * written;
            product += m * error[n];
            M[n] = m;
          }
          products[j] = product;
        }
        T* d_key_row = sums.d_key + now * k;
        const Lanes<T> product = strength * sums_of<T>(products);
        store_until(d_key_row, row, k, first ? product : load_until(d_key_row, row, k) + product);
      }
      Lanes<T> strengths = {};
      UNROLL for (int n = 0; n < N; ++n) {
        strengths += d_write[n] * error[n];
        d_error[n] = strength * d_write[n];
        columns.store(d_value + now * v, n, d_error[n]);
      }
      sums.d_beta[now] = (first ? T(0) : sums.d_beta[now]) + sum_of<T>(strengths);
    }
    for (int64_t row = 0; row < k; ++row)
      UNROLL for (int n = 0; n < N; ++n) G.M[row * N + n] -= d_error[n] * key_of(at, 0)[row];
    if (at.reset(0)) G.clear();
    G.write(d_state + head * k * v);
  }

  // Given dv, computes dq and the rest of dk, by columns of the transpose of W.
  template <int N>
  void backward_rows(int64_t head, int64_t slice) const {
    const Head at(head, t, h, g, marks);
    const Columns<T, N> columns{k, slice};
    Slice<T, N> M{columns, v, scratch<T>(v * N)};

    M.read_transposed(state + head * k * v);
    Pass<T, N, read, write, read> earlier;  // predict, write, read
    Pass<T, N, read, write, read, read, write, read> earlier_two;
    Pass<T, N, read> more;
    for (int64_t i = 0; i < t;) {
      const bool pair = g == 1 && i + 1 < t && !at.reset(i + 1);
      for (int64_t soon = i + 2 + pair; soon < i + 4 + pair && soon < t; ++soon) fetch(at.token(soon));
      if (at.reset(i)) M.clear();
      if (pair) {
        load_earlier(columns, at, i, earlier_two.w, earlier_two.x), load_earlier(columns, at, i + 1, earlier_two.w + 3, earlier_two.x + 3);
        earlier_two(M.M, v);
        store_earlier(columns, at, i, earlier_two.x), store_earlier(columns, at, i + 1, earlier_two.x + 3);
      } else {
        load_earlier(columns, at, i, earlier.w, earlier.x);
        earlier(M.M, v);
        store_earlier(columns, at, i, earlier.x);
        for (int64_t query = at.query(i) + 1; query < at.query(i) + g; ++query) {
          more.w[0] = d_out + query * v;
          more(M.M, v);
          UNROLL for (int n = 0; n < N; ++n) columns.store(d_q + query * k, n, scale * more.x[0][n]);
        }
      }
      i += 1 + pair;
    }
  }

 private:
  INLINE const T* key_of(const Head& at, int64_t i) const { return at.live(i) ? key + at.token(i) * k : zeros; }
  INLINE const T* value_of(const Head& at, int64_t i) const { return at.live(i) ? value + at.token(i) * v : zeros; }
  INLINE T beta_of(const Head& at, int64_t i) const { return at.live(i) ? beta[at.token(i)] : T(0); }

  // β (v − prediction), and the error itself.
  template <int N>
  INLINE void correct(Columns<T, N> columns, const Head& at, int64_t i, const Lanes<T>* predicted, Lanes<T>* correction) const {
    const T *wanted = value_of(at, i), strength = beta_of(at, i);
    UNROLL for (int n = 0; n < N; ++n) {
      const Lanes<T> error = columns.load(wanted, n) - predicted[n];
      if (errors) columns.store(errors + at.token(i) * v, n, error);
      correction[n] = strength * error;
    }
  }

  // The steps of one token over the transpose of W:  read dv,  + r ⊗ β k,  read dout.
  template <int N>
  INLINE void load_earlier(Columns<T, N> columns, const Head& at, int64_t i, const T** w, Lanes<T> (*x)[N]) const {
    const T *written = key_of(at, i), strength = beta_of(at, i);
    w[0] = d_value + at.token(i) * v, w[1] = errors + at.token(i) * v, w[2] = d_out + at.query(i) * v;
    UNROLL for (int n = 0; n < N; ++n) x[1][n] = strength * columns.load(written, n);
  }
  template <int N>
  INLINE void store_earlier(Columns<T, N> columns, const Head& at, int64_t i, const Lanes<T> (*x)[N]) const {
    UNROLL for (int n = 0; n < N; ++n) {
      columns.add(d_key + at.token(i) * k, n, -x[0][n]);
      columns.store(d_q + at.query(i) * k, n, scale * x[2][n]);
    }
  }

  INLINE void fetch(int64_t token) const {
    prefetch(q + token * g * k, g * k), prefetch(key + token * k, k);
    prefetch(d_out + token * g * v, g * v), prefetch(errors + token * v, v), prefetch(d_value + token * v, v);
    prefetch_to_write(d_q + token * g * k, g * k), prefetch_to_write(d_key + token * k, k);
  }
};

template <class T>
void delta_rule_forward(int threads, const int64_t* size, double scale, void* const* x) {
  DeltaRule<T> job = {size[0], size[1], size[3], size[4], size[5], size[2] / size[3], T(scale)};
  from(x, job.q, job.key, job.value, job.beta, job.state, job.marks.resets, job.marks.live, job.out, job.final_state,
       job.errors);
  const std::vector<T> zeros(job.marks.live ? std::max(job.k, job.v) : 0);
  job.zeros = zeros.data();
  threads = threads_for(threads, (2 + job.g) * job.b * job.t * job.h * job.k * job.v);
  for_slices<T>(threads, job.b * job.h, job.k, job.v, [&](auto N, int64_t head, int64_t slice) {
    job.template forward<N>(head, slice);
  });
}

template <class T>
void delta_rule_backward(int threads, const int64_t* size, double scale, void* const* x) {
  DeltaRule<T> job = {size[0], size[1], size[3], size[4], size[5], size[2] / size[3], T(scale)};
  from(x, job.q, job.key, job.beta, job.state, job.marks.resets, job.marks.live, job.errors, job.d_out, job.d_final,  //
       job.d_q, job.d_key, job.d_value, job.d_beta, job.d_state);
  const std::vector<T> zeros(job.marks.live ? std::max(job.k, job.v) : 0);
  job.zeros = zeros.data();
  const int64_t heads = job.b * job.h, tokens = heads * job.t;
  threads = threads_for(threads, (7 + 2 * job.g) * tokens * job.k * job.v);

  // The slices of a head are one task, which continues with the rows while the head's tokens are in the cache; or as many
  // tasks as needed to give every thread one, in which case each but the first has its own sums.
  const Slicing cut = slicing<T>(job.k, job.v, heads, threads);
  const int64_t tasks = std::min<int64_t>(cut.count, (threads + heads - 1) / heads);
  std::vector<T> others((tasks - 1) * tokens * (job.k + 1));
  const auto rows = [&](auto N, int64_t head, int64_t slice) { job.template backward_rows<N>(head, slice); };
  Pool::run(threads, heads * tasks, [&](int64_t i) {
    const int64_t head = i / tasks, task = i % tasks;
    T* mine = task ? others.data() + (task - 1) * tokens * (job.k + 1) : nullptr;
    const typename DeltaRule<T>::Sums sums = task ? typename DeltaRule<T>::Sums{mine, mine + tokens * job.k}
                                                  : typename DeltaRule<T>::Sums{job.d_key, job.d_beta};
    for (int64_t slice = task; slice < cut.count; slice += tasks)
      with_vectors<T>(cut.vectors, [&](auto N) { job.template backward_columns<N>(head, slice, sums, slice == task); });
    if (tasks == 1) for_slices<T>(1, 1, job.v, job.k, [&](auto N, int64_t, int64_t slice) { rows(N, head, slice); });
  });
  if (tasks == 1) return;
  for (int64_t task = 1; task < tasks; ++task) {
    const T* theirs = others.data() + (task - 1) * tokens * (job.k + 1);
    for (int64_t i = 0; i < tokens * job.k; ++i) job.d_key[i] += theirs[i];
    for (int64_t i = 0; i < tokens; ++i) job.d_beta[i] += theirs[tokens * job.k + i];
  }
  for_slices<T>(threads, heads, job.v, job.k, rows);
}
