// Linear attention.
//
//     W_t = W_{t−1} + k_t ⊗ v_t      z_t = z_{t−1} + k_t      out_t = W_tᵀ q_t / w_t,   w_t = z_t·q_t + ε
//
// Backward, with dn_t = dout_t / w_t, dw_t = −dout_t·out_t / w_t, and G, g the gradients of W_t, z_t:
//
//     G_t = G_{t+1} + q_t ⊗ dn_t      g_t = g_{t+1} + dw_t q_t
//     dv_t = G_tᵀ k_t      dk_t = G_t v_t + g_t      dq_t = W_t dn_t + dw_t z_t
//
// All four products with a matrix are done by the same sweep, over columns of W, G or one of their transposes.
//
// A token that is not live is treated as zeros. If g > 1 queries read a matrix, w and every term with q is a sum over the
// queries, or exists once per query.

template <class T>
struct LinearAttention {
  int64_t b, t, h, k, v, g;
  T epsilon;
  const T* zeros;  // as many as the larger of k and v; null if all tokens are live
  const T *q, *key, *value, *state, *key_sum;
  Marks marks;
  T *out, *final_state, *final_key_sum;
  const T *d_out, *d_final, *d_final_key_sum;
  T *d_q, *d_key, *d_value, *d_state, *d_key_sum;
  T *inverse_weight;  // 1 / w_t: [b, t, h·g]

  // The normaliser of one head: z, w and the final z.
  void forward_weights(int64_t head) const {
    const Head at(head, t, h, g, marks);
    T* z = final_key_sum + head * k;
    std::copy_n(key_sum + head * k, k, z);
    for (int64_t i = 0; i < t; ++i) {
      if (at.reset(i)) std::fill_n(z, k, T(0));
      if (at.live(i)) add(z, T(1), key + at.token(i) * k);
      for (int64_t query = at.query(i); query < at.query(i) + g; ++query) {
        T sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += z[j] * q[query * k + j];
        inverse_weight[query] = T(1) / (sum + epsilon);
      }
    }
  }

  // The same in the backward pass, which initialises dq and dk. final_key_sum is used as scratch memory.
  void backward_weights(int64_t head) const {
    const Head at(head, t, h, g, marks);
    forward_weights(head);
    std::vector<T> d_weight(t * g), z(key_sum + head * k, key_sum + (head + 1) * k);
    for (int64_t i = 0; i < t; ++i) {
      if (at.reset(i)) std::fill_n(z.data(), k, T(0));
      if (at.live(i)) add(z.data(), T(1), key + at.token(i) * k);
      for (int64_t n = 0; n < g; ++n) {
        const int64_t query = at.query(i) + n;
        T dot = 0;
        for (int64_t j = 0; j < v; ++j) dot += d_out[query * v + j] * out[query * v + j];
        const T d = d_weight[i * g + n] = -dot * inverse_weight[query];
        for (int64_t j = 0; j < k; j += L<T>) store_until(d_q + query * k, j, k, d * load_until(z.data(), j, k));
      }
    }
    T* d_z = d_key_sum + head * k;
    std::copy_n(d_final_key_sum + head * k, k, d_z);
    for (int64_t i = t - 1; i >= 0; --i) {
      if (at.reset(i + 1)) std::fill_n(d_z, k, T(0));
      for (int64_t n = 0; n < g; ++n) add(d_z, d_weight[i * g + n], q + (at.query(i) + n) * k);
      std::copy_n(at.live(i) ? d_z : zeros, k, d_key + at.token(i) * k);
    }
    if (at.reset(0)) std::fill_n(d_z, k, T(0));
  }

  // A sweep's work at token i: M += a ⊗ x, then y = Mᵀ b, where w divides x or y. Either a and x belong to the token's g
  // queries and b and y to its entry, or the other way round.
  enum Weight { on_x, on_y };
  template <int N>
  void sweep(const Head& at, bool forwards, Slice<T, N>& M, const T* a, const T* x, const T* b, T* y, bool add, Weight weighted) const {
    const Columns<T, N>& columns = M.columns;
    const int64_t rows = M.rows, width = columns.width;
    const int64_t writers = weighted == on_x ? g : 1, readers = weighted == on_y ? g : 1;
    Pass<T, N, write, read> pass;
    Pass<T, N, write> write_more;
    Pass<T, N, read> read_more;
    const auto put = [&](int64_t to, T by, const Lanes<T>* sums) __attribute__((always_inline)) {
      UNROLL for (int n = 0; n < N; ++n)
        if (add) columns.add(y + to * width, n, by * sums[n]);
        else columns.store(y + to * width, n, by * sums[n]);
    };
    for (int64_t step = 0; step < t; ++step) {
      const int64_t i = forwards ? step : t - 1 - step, from = at.token(i) * writers, to = at.token(i) * readers;
      const int64_t soon = at.token(forwards ? (i + 2 < t ? i + 2 : i) : (i > 1 ? i - 2 : i));
      prefetch(a + soon * writers * rows, writers * rows), prefetch(x + soon * writers * width, writers * width);
      prefetch(b + soon * readers * rows, readers * rows), prefetch_to_write(y + soon * readers * width, readers * width);
      if (at.reset(forwards ? i : i + 1)) M.clear();
      for (int64_t other = from + 1; other < from + writers; ++other) {
        UNROLL for (int n = 0; n < N; ++n) write_more.x[0][n] = inverse_weight[other] * columns.load(x + other * width, n);
        write_more.w[0] = a + other * rows;
        write_more(M.M, rows);
      }
      const bool nothing = !at.live(i), written = weighted == on_y;
      const T* from_x = nothing && written ? zeros : x + from * width;
      const T on_x_by = weighted == on_x ? inverse_weight[from] : T(1);
      UNROLL for (int n = 0; n < N; ++n) pass.x[0][n] = on_x_by * columns.load(from_x, n);
      pass.w[0] = nothing && written ? zeros : a + from * rows, pass.w[1] = nothing && !written ? zeros : b + to * rows;
      pass(M.M, rows);
      put(to, weighted == on_y ? inverse_weight[to] : T(1), pass.x[1]);
      for (int64_t other = to + 1; other < to + readers; ++other) {
        read_more.w[0] = b + other * rows;
        read_more(M.M, rows);
        put(other, inverse_weight[other], read_more.x[0]);
      }
    }
  }

  template <int N>
  void forward(int64_t head, int64_t slice) const {
    const Head at(head, t, h, g, marks);
    Slice<T, N> W{{v, slice}, k, scratch<T>(k * N)};
    W.read(state + head * k * v);
    sweep(at, true, W, key, value, q, out, false, on_y);
    W.write(final_state + head * k * v);
  }

  template <int N>
  void backward_columns(int64_t head, int64_t slice) const {
    const Head at(head, t, h, g, marks);
    Slice<T, N> G{{v, slice}, k, scratch<T>(k * N)};
    G.read(d_final + head * k * v);
    sweep(at, false, G, q, d_out, key, d_value, false, on_x);
    if (at.reset(0)) G.clear();
    G.write(d_state + head * k * v);
  }

  template <int N>
  void backward_rows(int64_t head, int64_t slice) const {
    const Head at(head, t, h, g, marks);
    Slice<T, N> M{{k, slice}, v, scratch<T>(v * N)};
    M.read_transposed(d_final + head * k * v);
    sweep(at, false, M, d_out, q, value, d_key, true, on_x);
    M.read_transposed(state + head * k * v);
    sweep(at, true, M, value, key, d_out, d_q, true, on_y);
  }

 private:
  INLINE void add(T* z, T factor, const T* row) const {
    for (int64_t j = 0; j < k; j += L<T>) store_until(z, j, k, load_until(z, j, k) + factor * load_until(row, j, k));
  }
};

template <class T>
void linear_attention_forward(int threads, const int64_t* size, double epsilon, void* const* x) {
  LinearAttention<T> job = {size[0], size[1], size[3], size[4], size[5], size[2] / size[3], T(epsilon)};
  from(x, job.q, job.key, job.value, job.state, job.key_sum, job.marks.resets, job.marks.live, job.out, job.final_state,
       job.final_key_sum);
  const int64_t heads = job.b * job.h;
  threads = threads_for(threads, (1 + job.g) * heads * job.t * job.k * job.v);
  const std::vector<T> zeros(job.marks.live ? std::max(job.k, job.v) : 0);
  std::vector<T> inverse_weight(heads * job.t * job.g);
  job.zeros = zeros.data(), job.inverse_weight = inverse_weight.data();
  Pool::run(threads, heads, [&](int64_t head) { job.forward_weights(head); });
  for_slices<T>(threads, heads, job.k, job.v, [&](auto N, int64_t head, int64_t slice) {
    job.template forward<N>(head, slice);
  });
}

template <class T>
void linear_attention_backward(int threads, const int64_t* size, double epsilon, void* const* x) {
  LinearAttention<T> job = {size[0], size[1], size[3], size[4], size[5], size[2] / size[3], T(epsilon)};
  const T* out;
  from(x, job.q, job.key, job.value, job.state, job.key_sum, job.marks.resets, job.marks.live, out, job.d_out, job.d_final,
       job.d_final_key_sum, job.d_q, job.d_key, job.d_value, job.d_state, job.d_key_sum);
  job.out = const_cast<T*>(out);
  const int64_t heads = job.b * job.h;
  threads = threads_for(threads, (3 + 3 * job.g) * heads * job.t * job.k * job.v);
  const std::vector<T> zeros(job.marks.live ? std::max(job.k, job.v) : 0);
  std::vector<T> inverse_weight(heads * job.t * job.g), key_sums(heads * job.k);
  job.zeros = zeros.data(), job.inverse_weight = inverse_weight.data();
  job.final_key_sum = key_sums.data();
  Pool::run(threads, heads, [&](int64_t head) { job.backward_weights(head); });
  for_slices<T>(threads, heads, job.k, job.v, [&](auto N, int64_t head, int64_t slice) {
    job.template backward_columns<N>(head, slice);
  });
  for_slices<T>(threads, heads, job.v, job.k, [&](auto N, int64_t head, int64_t slice) {
    job.template backward_rows<N>(head, slice);
  });
}
