// The delta rule.
//
//     r_t = v_t − W_{t−1}ᵀ k_t      W_t = W_{t−1} + k_t ⊗ β_t r_t      out_t = scale · W_tᵀ q_t
//
// The columns of W never meet, so a slice of columns is a task of its own: it stays in the first-level cache, and one
// pass over it writes and reads two tokens and predicts the next two. The errors r are kept for the backward pass.
//
// Backward, with G_t the gradient of W_t and du_t = G_tᵀ k_t that of β_t r_t:
//
//     G_t = G_{t+1} − k_{t+1} ⊗ dv_{t+1} + scale · q_t ⊗ dout_t
//     dv_t = β_t du_t      dβ_t = du_t · r_t      dq_t = scale · W_t dout_t      dk_t = β_t G_t r_t − W_{t−1} dv_t
//
// Given r and dv, every step above only adds products to a matrix, so that W itself is rebuilt forwards from the
// initial state: nothing but r is kept, and nothing is inverted. One sweep over G backwards in time, then one over the
// transpose of W forwards, so that the sums over v (dq, dk) run along lanes; those of G r_t are a sum for each row.

template <class T>
struct DeltaRule {
  int64_t b, t, h, k, v;
  T scale;
  const T *q, *key, *value, *beta, *state;
  const uint8_t* resets;  // [b, t] or null
  T *errors, *out, *final_state;
  const T *d_out, *d_final;
  T *d_q, *d_key, *d_value, *d_beta, *d_state;

  // Two tokens a pass. Both are predicted before either is written; the second then sees the first one's write.
  template <int N>
  void forward(int64_t head, int64_t slice) const {
    const Head at(head, t, h, resets);
    const Columns<T, N> columns{v, slice};
    Slice<T, N> W{columns, k, scratch<T>(k * N)};
    W.read(state + head * k * v);

    Pass<T, N, read, read> look;
    Pass<T, N, write, read, read, read> one;
    Pass<T, N, write, read, write, read, read, read> two;
    look.w[0] = key + at.token(0) * k, look.w[1] = key + at.token(t > 1) * k;
    look(W.M, k);
    for (int64_t i = 0; i < t;) {
      const bool pair = i + 1 < t && !at.reset(i + 1);
      const int64_t first = at.token(i), second = at.token(i + pair), after = i + 1 + pair;
      const T* next[2] = {key + at.token(after < t ? after : i) * k, key + at.token(after + 1 < t ? after + 1 : i) * k};
      for (int64_t soon = after + 2; soon < after + 4 && soon < t; ++soon) {
        const int64_t token = at.token(soon);
        prefetch(q + token * k, k), prefetch(key + token * k, k), prefetch(value + token * v, v);
        prefetch_to_write(out + token * v, v);
        if (errors) prefetch_to_write(errors + token * v, v);
      }
      if (at.reset(i)) {
        W.clear();
        UNROLL for (int n = 0; n < N; ++n) look.x[0][n] = look.x[1][n] = Lanes<T>{};
      }
      Lanes<T> correction[N];
      correct(columns, first, look.x[0], correction);
      if (pair) {
        const T overlap = dot(key + first * k, key + second * k, k);
        UNROLL for (int n = 0; n < N; ++n) {
          two.x[0][n] = correction[n];
          look.x[1][n] += overlap * correction[n];
        }
        correct(columns, second, look.x[1], two.x[2]);
        two.w[0] = key + first * k, two.w[1] = q + first * k, two.w[2] = key + second * k, two.w[3] = q + second * k;
        two.w[4] = next[0], two.w[5] = next[1];
        two(W.M, k);
        UNROLL for (int n = 0; n < N; ++n) {
          columns.store(out + first * v, n, scale * two.x[1][n]);
          columns.store(out + second * v, n, scale * two.x[3][n]);
          look.x[0][n] = two.x[4][n], look.x[1][n] = two.x[5][n];
        }
      } else {
        UNROLL for (int n = 0; n < N; ++n) one.x[0][n] = correction[n];
        one.w[0] = key + first * k, one.w[1] = q + first * k, one.w[2] = next[0], one.w[3] = next[1];
        one(W.M, k);
        UNROLL for (int n = 0; n < N; ++n) {
          columns.store(out + first * v, n, scale * one.x[1][n]);
          look.x[0][n] = one.x[2][n], look.x[1][n] = one.x[3][n];
        }
      }
      i = after;
    }
    W.write(final_state + head * k * v);
  }

  // Where the columns of one task add up what is a sum over all of them: dβ, and of dk the part β G r.
  struct Sums {
    T *d_key, *d_beta;
  };

  // Backwards in time over columns of G: dv, the gradient of the initial state, and these columns' part of the sums.
  template <int N>
  void backward_columns(int64_t head, int64_t slice, Sums sums, bool first) const {
    const Head at(head, t, h, resets);
    const Columns<T, N> columns{v, slice};
    Slice<T, N> G{columns, k, scratch<T>(k * N)};
    G.read(d_final + head * k * v);

    Lanes<T> own[N], d_error[N] = {}, error[N], d_read[N];
    UNROLL for (int n = 0; n < N; ++n) own[n] = columns.own(n);
    for (int64_t i = t - 1; i >= 0; --i) {
      const bool last = i + 1 == t || at.reset(i + 1);  // of its segment: no later token's key is looked at
      const int64_t now = at.token(i), later = at.token(last ? i : i + 1), soon = at.token(i > 1 ? i - 2 : i);
      prefetch(q + soon * k, k), prefetch(key + soon * k, k);
      prefetch(d_out + soon * v, v), prefetch(errors + soon * v, v);
      prefetch_to_write(d_value + soon * v, v), prefetch_to_write(sums.d_key + soon * k, k);
      if (last && i + 1 < t) {
        G.clear();
        UNROLL for (int n = 0; n < N; ++n) d_error[n] = Lanes<T>{};
      }
      UNROLL for (int n = 0; n < N; ++n) {
        d_read[n] = scale * columns.load(d_out + now * v, n);
        error[n] = own[n] * columns.load(errors + now * v, n);
      }
      Lanes<T> d_write[N] = {};
      for (int64_t row = 0; row < k; row += L<T>) {
        const int64_t rows = std::min<int64_t>(L<T>, k - row);
        Lanes<T> products[L<T>];
        for (int64_t j = rows; j < L<T>; ++j) products[j] = Lanes<T>{};
        for (int64_t j = 0; j < rows; ++j) {
          Lanes<T>* M = G.M + (row + j) * N;
          const Lanes<T> k_later = broadcast(key + later * k + row + j), q_now = broadcast(q + now * k + row + j);
          const Lanes<T> k_now = broadcast(key + now * k + row + j);
          Lanes<T> product = {};
          UNROLL for (int n = 0; n < N; ++n) {
            const Lanes<T> m = M[n] - d_error[n] * k_later + d_read[n] * q_now;
            d_write[n] += m * k_now;
            product += m * error[n];
            M[n] = m;
          }
          products[j] = product;
        }
        T* d_key_row = sums.d_key + now * k;
        const Lanes<T> product = beta[now] * sums_of<T>(products);
        store_until(d_key_row, row, k, first ? product : load_until(d_key_row, row, k) + product);
      }
      Lanes<T> strengths = {};
      UNROLL for (int n = 0; n < N; ++n) {
        strengths += d_write[n] * error[n];
        d_error[n] = beta[now] * d_write[n];
        columns.store(d_value + now * v, n, d_error[n]);
      }
      sums.d_beta[now] = (first ? T(0) : sums.d_beta[now]) + sum_of<T>(strengths);
    }
    for (int64_t row = 0; row < k; ++row)
      UNROLL for (int n = 0; n < N; ++n) G.M[row * N + n] -= d_error[n] * key[at.token(0) * k + row];
    if (at.reset(0)) G.clear();
    G.write(d_state + head * k * v);
  }

  // Given dv: dq, and the rest of dk, by columns of the transpose of W.
  template <int N>
  void backward_rows(int64_t head, int64_t slice) const {
    const Head at(head, t, h, resets);
    const Columns<T, N> columns{k, slice};
    Slice<T, N> M{columns, v, scratch<T>(v * N)};

    M.read_transposed(state + head * k * v);
    Pass<T, N, read, write, read> earlier;  // predicted here, written here, read here
    Pass<T, N, read, write, read, read, write, read> earlier_two;
    for (int64_t i = 0; i < t;) {
      const bool pair = i + 1 < t && !at.reset(i + 1);
      for (int64_t soon = i + 2 + pair; soon < i + 4 + pair && soon < t; ++soon) fetch(at.token(soon));
      if (at.reset(i)) M.clear();
      const int64_t now[2] = {at.token(i), at.token(i + pair)};
      if (pair) {
        load_earlier(columns, now[0], earlier_two.w, earlier_two.x), load_earlier(columns, now[1], earlier_two.w + 3, earlier_two.x + 3);
        earlier_two(M.M, v);
        store_earlier(columns, now[0], earlier_two.x), store_earlier(columns, now[1], earlier_two.x + 3);
      } else {
        load_earlier(columns, now[0], earlier.w, earlier.x);
        earlier(M.M, v);
        store_earlier(columns, now[0], earlier.x);
      }
      i += 1 + pair;
    }
  }

 private:
  // β (v − prediction), and the error in it.
  template <int N>
  INLINE void correct(Columns<T, N> columns, int64_t token, const Lanes<T>* predicted, Lanes<T>* correction) const {
    UNROLL for (int n = 0; n < N; ++n) {
      const Lanes<T> error = columns.load(value + token * v, n) - predicted[n];
      if (errors) columns.store(errors + token * v, n, error);
      correction[n] = beta[token] * error;
    }
  }

  // The steps of one token over the transpose of W:  read dv,  + r ⊗ β k,  read dout.
  template <int N>
  INLINE void load_earlier(Columns<T, N> columns, int64_t token, const T** w, Lanes<T> (*x)[N]) const {
    w[0] = d_value + token * v, w[1] = errors + token * v, w[2] = d_out + token * v;
    UNROLL for (int n = 0; n < N; ++n) x[1][n] = beta[token] * columns.load(key + token * k, n);
  }
  template <int N>
  INLINE void store_earlier(Columns<T, N> columns, int64_t token, const Lanes<T> (*x)[N]) const {
    UNROLL for (int n = 0; n < N; ++n) {
      columns.add(d_key + token * k, n, -x[0][n]);
      columns.store(d_q + token * k, n, scale * x[2][n]);
    }
  }

  INLINE void fetch(int64_t token) const {
    prefetch(q + token * k, k), prefetch(key + token * k, k);
    prefetch(d_out + token * v, v), prefetch(errors + token * v, v), prefetch(d_value + token * v, v);
    prefetch_to_write(d_q + token * k, k), prefetch_to_write(d_key + token * k, k);
  }
};

template <class T>
void delta_rule_forward(int threads, const int64_t* size, double scale, void* const* x) {
  DeltaRule<T> job = {size[0], size[1], size[2], size[3], size[4], T(scale)};
  from(x, job.q, job.key, job.value, job.beta, job.state, job.resets, job.out, job.final_state, job.errors);
  threads = threads_for(threads, 3 * job.b * job.t * job.h * job.k * job.v);
  for_slices<T>(threads, job.b * job.h, job.k, job.v, [&](auto N, int64_t head, int64_t slice) {
    job.template forward<N>(head, slice);
  });
}

template <class T>
void delta_rule_backward(int threads, const int64_t* size, double scale, void* const* x) {
  DeltaRule<T> job = {size[0], size[1], size[2], size[3], size[4], T(scale)};
  from(x, job.q, job.key, job.beta, job.state, job.resets, job.errors, job.d_out, job.d_final,  //
       job.d_q, job.d_key, job.d_value, job.d_beta, job.d_state);
  const int64_t heads = job.b * job.h, tokens = heads * job.t;
  threads = threads_for(threads, 9 * tokens * job.k * job.v);

  // A head's slices are one task, which then goes on with the rows while the head's tokens are still in the cache; or as
  // many as it takes to give every thread one: each but the first then has its own sums.
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
