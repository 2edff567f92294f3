// Linear attention.
//
//     W_t = W_{t−1} + k_t ⊗ v_t      z_t = z_{t−1} + k_t      out_t = W_tᵀ q_t / w_t,   w_t = z_t·q_t + ε
//
// Backward, with dn_t = dout_t / w_t, dw_t = −dout_t·out_t / w_t, and G, g the gradients of W_t, z_t:
//
//     G_t = G_{t+1} + q_t ⊗ dn_t      g_t = g_{t+1} + dw_t q_t
//     dv_t = G_tᵀ k_t      dk_t = G_t v_t + g_t      dq_t = W_t dn_t + dw_t z_t
//
// Each of the four products with a matrix is one and the same sweep, over columns of W, G or a transpose of them.

template <class T>
struct LinearAttention {
  int64_t b, t, h, k, v;
  T epsilon;
  const T *q, *key, *value, *state, *key_sum;
  const uint8_t* resets;
  T *out, *final_state, *final_key_sum;
  const T *d_out, *d_final, *d_final_key_sum;
  T *d_q, *d_key, *d_value, *d_state, *d_key_sum;
  T *inverse_weight;  // 1 / w_t: [b, t, h]

  // Everything of the normaliser's, for one head: z, w and the final z.
  void forward_weights(int64_t head) const {
    const Head at(head, t, h, resets);
    T* z = final_key_sum + head * k;
    std::copy_n(key_sum + head * k, k, z);
    for (int64_t i = 0; i < t; ++i) {
      if (at.reset(i)) std::fill_n(z, k, T(0));
      inverse_weight[at.token(i)] = T(1) / (add_and_read(z, key + at.token(i) * k, q + at.token(i) * k) + epsilon);
    }
  }

  // The same backwards, which begins dq and dk. final_key_sum is scratch here.
  void backward_weights(int64_t head) const {
    const Head at(head, t, h, resets);
    forward_weights(head);
    std::vector<T> d_weight(t), z(key_sum + head * k, key_sum + (head + 1) * k);
    for (int64_t i = 0; i < t; ++i) {
      const int64_t now = at.token(i);
      if (at.reset(i)) std::fill_n(z.data(), k, T(0));
      T dot = 0;
      for (int64_t j = 0; j < v; ++j) dot += d_out[now * v + j] * out[now * v + j];
      d_weight[i] = -dot * inverse_weight[now];
      for (int64_t j = 0; j < k; ++j) d_q[now * k + j] = d_weight[i] * (z[j] += key[now * k + j]);
    }
    T* g = d_key_sum + head * k;
    std::copy_n(d_final_key_sum + head * k, k, g);
    for (int64_t i = t - 1; i >= 0; --i) {
      const int64_t now = at.token(i);
      if (at.reset(i + 1)) std::fill_n(g, k, T(0));
      for (int64_t j = 0; j < k; ++j) d_key[now * k + j] = g[j] += d_weight[i] * q[now * k + j];
    }
    if (at.reset(0)) std::fill_n(g, k, T(0));
  }

  // What a sweep does at token i: M += a ⊗ x, then y = Mᵀ b, where w divides x or y.
  enum Weight { on_x, on_y };
  template <int N>
  void sweep(const Head& at, bool forwards, Slice<T, N>& M, const T* a, const T* x, const T* b, T* y, bool add, Weight weighted) const {
    const Columns<T, N>& columns = M.columns;
    const int64_t rows = M.rows, width = columns.width;
    Pass<T, N, write, read> pass;
    for (int64_t step = 0; step < t; ++step) {
      const int64_t i = forwards ? step : t - 1 - step, now = at.token(i);
      const int64_t soon = at.token(forwards ? (i + 2 < t ? i + 2 : i) : (i > 1 ? i - 2 : i));
      prefetch(a + soon * rows, rows), prefetch(b + soon * rows, rows), prefetch(x + soon * width, width);
      prefetch_to_write(y + soon * width, width);
      if (at.reset(forwards ? i : i + 1)) M.clear();
      const T on_x_by = weighted == on_x ? inverse_weight[now] : T(1);
      const T on_y_by = weighted == on_y ? inverse_weight[now] : T(1);
      UNROLL for (int n = 0; n < N; ++n) pass.x[0][n] = on_x_by * columns.load(x + now * width, n);
      pass.w[0] = a + now * rows, pass.w[1] = b + now * rows;
      pass(M.M, rows);
      UNROLL for (int n = 0; n < N; ++n)
        if (add) columns.add(y + now * width, n, on_y_by * pass.x[1][n]);
        else columns.store(y + now * width, n, on_y_by * pass.x[1][n]);
    }
  }

  template <int N>
  void forward(int64_t head, int64_t slice) const {
    const Head at(head, t, h, resets);
    Slice<T, N> W{{v, slice}, k, scratch<T>(k * N)};
    W.read(state + head * k * v);
    sweep(at, true, W, key, value, q, out, false, on_y);
    W.write(final_state + head * k * v);
  }

  template <int N>
  void backward_columns(int64_t head, int64_t slice) const {
    const Head at(head, t, h, resets);
    Slice<T, N> G{{v, slice}, k, scratch<T>(k * N)};
    G.read(d_final + head * k * v);
    sweep(at, false, G, q, d_out, key, d_value, false, on_x);
    if (at.reset(0)) G.clear();
    G.write(d_state + head * k * v);
  }

  template <int N>
  void backward_rows(int64_t head, int64_t slice) const {
    const Head at(head, t, h, resets);
    Slice<T, N> M{{k, slice}, v, scratch<T>(v * N)};
    M.read_transposed(d_final + head * k * v);
    sweep(at, false, M, d_out, q, value, d_key, true, on_x);
    M.read_transposed(state + head * k * v);
    sweep(at, true, M, value, key, d_out, d_q, true, on_y);
  }

 private:
  // z += key, then z·q.
  T add_and_read(T* z, const T* key, const T* q) const {
    T dot = 0;
    for (int64_t j = 0; j < k; ++j) dot += (z[j] += key[j]) * q[j];
    return dot;
  }
};

template <class T>
void linear_attention_forward(int threads, const int64_t* size, double epsilon, void* const* x) {
  LinearAttention<T> job = {size[0], size[1], size[2], size[3], size[4], T(epsilon)};
  from(x, job.q, job.key, job.value, job.state, job.key_sum, job.resets, job.out, job.final_state, job.final_key_sum);
  const int64_t heads = job.b * job.h;
  threads = threads_for(threads, 2 * heads * job.t * job.k * job.v);
  std::vector<T> inverse_weight(heads * job.t);
  job.inverse_weight = inverse_weight.data();
  Pool::run(threads, heads, [&](int64_t head) { job.forward_weights(head); });
  for_slices<T>(threads, heads, job.k, job.v, [&](auto N, int64_t head, int64_t slice) {
    job.template forward<N>(head, slice);
  });
}

template <class T>
void linear_attention_backward(int threads, const int64_t* size, double epsilon, void* const* x) {
  LinearAttention<T> job = {size[0], size[1], size[2], size[3], size[4], T(epsilon)};
  const T* out;
  from(x, job.q, job.key, job.value, job.state, job.key_sum, job.resets, out, job.d_out, job.d_final,
       job.d_final_key_sum, job.d_q, job.d_key, job.d_value, job.d_state, job.d_key_sum);
  job.out = const_cast<T*>(out);
  const int64_t heads = job.b * job.h;
  threads = threads_for(threads, 6 * heads * job.t * job.k * job.v);
  std::vector<T> inverse_weight(heads * job.t), key_sums(heads * job.k);
  job.inverse_weight = inverse_weight.data();
  job.final_key_sum = key_sums.data();
  Pool::run(threads, heads, [&](int64_t head) { job.backward_weights(head); });
  for_slices<T>(threads, heads, job.k, job.v, [&](auto N, int64_t head, int64_t slice) {
    job.template backward_columns<N>(head, slice);
  });
  for_slices<T>(threads, heads, job.v, job.k, [&](auto N, int64_t head, int64_t slice) {
    job.template backward_rows<N>(head, slice);
  });
}
