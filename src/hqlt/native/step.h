// One token of a whole layer: both memories between the projections and the mixer, and the state after it.
//
//     FW-memory:  write what the schedule says (the own pair, the one that leaves the window, a whole chunk), read φ(q)
//     KV-memory:  softmax over the held pairs within reach and the own one
//     state:      the pairs, one slot older, the own pair in the last slot; zeros in unused slots
//
// A held pair is unrotated. Turning q by its age, (c q₁ − s q₂, c q₂ + s q₁), gives the product that turning both by
// their positions would: the table holds cos and sin by age, and nothing counts tokens.
//
// A task is a row's stretch of heads, whose numbers lie side by side in a slot: pairs are read and copied in the order in
// which they lie in memory. The state that was given is only read.

template <class T>
struct OneToken {
  enum Writes { own, leaving, chunk };
  static constexpr T epsilon = T(1e-10);  // of linear attention's normaliser

  int64_t b, h, k, v, s, s_after, window, writes, is_linear;
  T scale;
  const T *q, *key, *value, *beta, *keys, *values, *betas, *state, *key_sum, *cos, *sin;
  const int64_t* position;
  const uint8_t* resets;  // [b] or null
  T *fw, *kv, *keys_after, *values_after, *betas_after, *final_state, *final_key_sum;  // fw, kv: null without a memory
  int64_t* position_after;

  static int64_t whole(int64_t width) { return (width + L<T> - 1) / L<T>; }

  // What the FW-memory writes for one head: n pairs, h rows apart.
  struct Written {
    const T *key, *value, *beta;
    int64_t n;
  };
  Written written(int64_t row, int64_t head, int64_t now) const {
    const int64_t mine = row * h + head, oldest = row * s * h + head;
    if (writes == own) return {key + mine * k, value + mine * v, beta + mine, 1};
    const bool full = s == window && now >= window;
    if (writes == leaving) return {keys + oldest * k, values + oldest * v, beta + mine, full};
    return {keys + oldest * k, values + oldest * v, betas + oldest, full && now % window == 0 ? s : 0};
  }

  void operator()(int64_t row, int64_t first, int64_t last) const {
    const bool reset = resets && resets[row];
    const int64_t now = reset ? 0 : position[row];
    if (fw)
      for (int64_t head = first; head < last; ++head) fast_weights(row, head, now, reset || (writes == chunk && now == 0));
    if (kv) pairs(row, first, last, now);
    if (first == 0) position_after[row] = now + 1;
  }

  void fast_weights(int64_t row, int64_t head, int64_t now, bool empty) const {
    const Written pairs = written(row, head, now);
    const int64_t mine = row * h + head, width = whole(k);
    Lanes<T>* memory = scratch<T>((1 + pairs.n) * width + k * widest_slice<T>);
    Lanes<T>*features = memory + k * widest_slice<T>, *reader = features + pairs.n * width;
    for (int64_t j = 0; j < pairs.n; ++j) feature(pairs.key + j * h * k, features + j * width);
    feature(q + mine * k, reader);

    T factor = scale;
    if (is_linear) {
      const T* phi = reinterpret_cast<const T*>(features);
      T* z = final_key_sum + mine * k;
      for (int64_t i = 0; i < k; ++i) z[i] = empty ? T(0) : key_sum[mine * k + i];
      for (int64_t j = 0; j < pairs.n; ++j)
        for (int64_t i = 0; i < k; ++i) z[i] += pairs.beta[j * h] * phi[j * width * L<T> + i];
      factor = T(1) / (dot(z, reinterpret_cast<const T*>(reader), k) + epsilon);
    }
    constexpr int wide = LANE_BYTES == 64 ? 8 : 4;
    if (pairs.n == 1 && !empty && v % (wide * L<T>) == 0) {
      for (int64_t slice = 0; slice < v / (wide * L<T>); ++slice) one_write<wide>({v, slice}, mine, pairs, features, factor);
      return;
    }
    const Slicing cut = slicing<T>(k, v, 1, 1);
    for (int64_t slice = 0; slice < cut.count; ++slice) {
      if (cut.vectors == 1) columns<1>({v, slice}, mine, pairs, memory, features, empty, factor);
      else if (cut.vectors == 2) columns<2>({v, slice}, mine, pairs, memory, features, empty, factor);
      else if constexpr (widest_slice<T> == 4) columns<4>({v, slice}, mine, pairs, memory, features, empty, factor);
    }
  }

  // The writes, each predicted while the one before is written, and the read: over a slice of the matrix's columns.
  template <int N>
  void columns(Columns<T, N> at, int64_t mine, Written pairs, Lanes<T>* memory, const Lanes<T>* features, bool empty, T factor) const {
    Slice<T, N> W{at, k, memory};
    if (empty) W.clear();
    else W.read(state + mine * k * v);
    Pass<T, N, read> look;
    look.w[0] = reinterpret_cast<const T*>(features);
    look(W.M, k);
    Pass<T, N, write, read> pass;
    UNROLL for (int n = 0; n < N; ++n) pass.x[1][n] = look.x[0][n];
    for (int64_t j = 0; j < pairs.n; ++j) {
      UNROLL for (int n = 0; n < N; ++n) {
        const Lanes<T> value = at.load(pairs.value + j * h * v, n);
        pass.x[0][n] = pairs.beta[j * h] * (is_linear ? value : value - pass.x[1][n]);
      }
      pass.w[0] = reinterpret_cast<const T*>(features + j * whole(k)), pass.w[1] = pass.w[0] + whole(k) * L<T>;
      pass(W.M, k);
    }
    UNROLL for (int n = 0; n < N; ++n) at.store(fw + mine * v, n, factor * pass.x[1][n]);
    W.write(final_state + mine * k * v);
  }

  // The same for a single write: whole rows in the order of memory, once to predict, once to write and read.
  template <int N>
  void one_write(Columns<T, N> at, int64_t mine, Written pairs, const Lanes<T>* features, T factor) const {
    const T *phi_k = reinterpret_cast<const T*>(features), *phi_q = reinterpret_cast<const T*>(features + whole(k));
    const T* W = state + mine * k * v + at.begin(0);
    T* to = final_state + mine * k * v + at.begin(0);
    Lanes<T> sum[N] = {}, correction[N];
    if (!is_linear)
      for (int64_t i = 0; i < k; ++i)
        UNROLL for (int n = 0; n < N; ++n) sum[n] += phi_k[i] * load(W + i * v + n * L<T>);
    UNROLL for (int n = 0; n < N; ++n) {
      correction[n] = pairs.beta[0] * (load(pairs.value + at.begin(n)) - sum[n]);
      sum[n] = Lanes<T>{};
    }
    for (int64_t i = 0; i < k; ++i) {
      prefetch(W + (k + i) * v, N * L<T>);  // the next head's matrix
      UNROLL for (int n = 0; n < N; ++n) {
        const Lanes<T> w = load(W + i * v + n * L<T>) + phi_k[i] * correction[n];
        store(to + i * v + n * L<T>, w);
        sum[n] += phi_q[i] * w;
      }
    }
    UNROLL for (int n = 0; n < N; ++n) store(fw + mine * v + at.begin(n), factor * sum[n]);
  }

  // Ages count from the own pair, 0; the pair in slot i is s − i tokens old.
  void pairs(int64_t row, int64_t first, int64_t last, int64_t now) const {
    const int64_t since = writes == chunk && fw ? now % window : std::min(now, window - 1), reach = std::min(since, s);
    const int64_t kept = std::min(writes == chunk && fw ? since + 1 : now + 1, s_after), heads = last - first;
    const int64_t mine = row * h + first, width = whole(reach + 1);
    Lanes<T>* weights = scratch<T>(heads * width);
    T* scores = reinterpret_cast<T*>(weights);  // [heads, age]
    std::fill_n(scores, heads * width * L<T>, -std::numeric_limits<T>::infinity());

    for (int64_t head = 0; head < heads; ++head)
      scores[head * width * L<T>] = scale * dot(q + (mine + head) * k, key + (mine + head) * k, k);
    clear_unused(keys_after, row, first, heads, kept, k);
    for (int64_t age = std::max(reach, kept - 1); age > 0; --age) {
      const T* held = keys + ((row * s + s - age) * h + first) * k;
      prefetch(held + 2 * h * k, heads * k);
      if (age < kept) std::copy_n(held, heads * k, keys_after + ((row * s_after + s_after - age - 1) * h + first) * k);
      if (age > reach) continue;
      for (int64_t head = 0; head < heads; ++head)
        scores[head * width * L<T> + age] = scale * product(q + (mine + head) * k, held + head * k, age);
    }
    if (kept > 0) std::copy_n(key + mine * k, heads * k, keys_after + ((row * s_after + s_after - 1) * h + first) * k);

    for (int64_t head = 0; head < heads; ++head) softmax(weights + head * width, width);

    for (int64_t head = 0; head < heads; ++head) {
      std::fill_n(kv + (mine + head) * v, v, T(0));
      add(kv + (mine + head) * v, scores[head * width * L<T>], value + (mine + head) * v);
    }
    clear_unused(values_after, row, first, heads, kept, v);
    for (int64_t age = std::max(reach, kept - 1); age > 0; --age) {
      const T* held = values + ((row * s + s - age) * h + first) * v;
      prefetch(held + 2 * h * v, heads * v);
      if (age < kept) std::copy_n(held, heads * v, values_after + ((row * s_after + s_after - age - 1) * h + first) * v);
      if (age > reach) continue;
      for (int64_t head = 0; head < heads; ++head)
        add(kv + (mine + head) * v, scores[head * width * L<T> + age], held + head * v);
    }
    if (kept > 0) std::copy_n(value + mine * v, heads * v, values_after + ((row * s_after + s_after - 1) * h + first) * v);

    if (!betas_after) return;
    clear_unused(betas_after, row, first, heads, kept, 1);
    for (int64_t age = 1; age < kept; ++age)
      std::copy_n(betas + (row * s + s - age) * h + first, heads, betas_after + (row * s_after + s_after - age - 1) * h + first);
    if (kept > 0) std::copy_n(beta + mine, heads, betas_after + (row * s_after + s_after - 1) * h + first);
  }

 private:
  void clear_unused(T* after, int64_t row, int64_t first, int64_t heads, int64_t kept, int64_t width) const {
    for (int64_t slot = 0; slot < s_after - kept; ++slot)
      std::fill_n(after + ((row * s_after + slot) * h + first) * width, heads * width, T(0));
  }

  // φ of a row: SiLU(x) / √(‖SiLU(x)‖² + 1e-6) for the delta rule, elu(x) + 1 for the additive one.
  void feature(const T* row, Lanes<T>* to) const {
    T* x = reinterpret_cast<T*>(to);
    std::copy_n(row, k, x);
    std::fill_n(x + k, whole(k) * L<T> - k, T(0));
    for (int64_t n = 0; n < whole(k); ++n) {
      const Lanes<T> at = to[n], small = exponential<T>(at > T(0) ? -at : at);
      if (is_linear) to[n] = at > T(0) ? at + T(1) : small + (at - at);  // + 0, or NaN where x is
      else to[n] = at * (at > T(0) ? Lanes<T>{} + T(1) : small) / (T(1) + small);
    }
    if (is_linear) return;
    const T inverse = T(1) / std::sqrt(dot(x, x, k) + T(1e-6));
    for (int64_t n = 0; n < whole(k); ++n) to[n] *= inverse;
  }

  // q·k where k is `age` tokens older: q₁, q₂ and k₁, k₂ are the halves of a head.
  INLINE T product(const T* q, const T* key, int64_t age) const {
    if (!cos) return dot(q, key, k);
    const int64_t half = k / 2;
    const T *c = cos + age * half, *s = sin + age * half;
    Lanes<T> sums = {};
    int64_t i = 0;
    for (; i + L<T> <= half; i += L<T>) {
      const Lanes<T> q1 = load(q + i), q2 = load(q + half + i), ci = load(c + i), si = load(s + i);
      sums += load(key + i) * (ci * q1 - si * q2) + load(key + half + i) * (ci * q2 + si * q1);
    }
    T sum = 0;
    for (; i < half; ++i) sum += key[i] * (c[i] * q[i] - s[i] * q[half + i]) + key[half + i] * (c[i] * q[half + i] + s[i] * q[i]);
    for (int lane = 0; lane < L<T>; ++lane) sum += sums[lane];
    return sum;
  }

  static void softmax(Lanes<T>* x, int64_t width) {
    Lanes<T> most = x[0], totals = {};
    for (int64_t n = 1; n < width; ++n) most = x[n] > most ? x[n] : most;
    T top = most[0], total = 0;
    for (int lane = 1; lane < L<T>; ++lane) top = std::max(top, T(most[lane]));
    for (int64_t n = 0; n < width; ++n) totals += x[n] = exponential<T>(x[n] - top);
    for (int lane = 0; lane < L<T>; ++lane) total += totals[lane];
    for (int64_t n = 0; n < width; ++n) x[n] /= total;
  }

  INLINE void add(T* to, T weight, const T* row) const {
    int64_t i = 0;
    for (; i + L<T> <= v; i += L<T>) store(to + i, load(to + i) + weight * load(row + i));
    for (; i < v; ++i) to[i] += weight * row[i];
  }
};

template <class T>
void one_token_forward(int threads, const int64_t* n, double scale, void* const* x) {
  OneToken<T> job = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], T(scale)};
  from(x, job.q, job.key, job.value, job.beta, job.keys, job.values, job.betas, job.state, job.key_sum, job.position,
       job.resets, job.cos, job.sin, job.fw, job.kv, job.keys_after, job.values_after, job.betas_after, job.final_state,
       job.final_key_sum, job.position_after);
  const int64_t fw = job.fw ? 3 * job.k * job.v : 0, kv = job.kv ? 2 * job.s * (job.k + job.v) : 0;
  threads = threads_for(threads, job.b * job.h * (fw + kv));
  const int64_t stretches = std::min((threads + job.b - 1) / job.b, job.h), heads = (job.h + stretches - 1) / stretches;
  Pool::run(threads, job.b * stretches, [&](int64_t task) {
    const int64_t first = task % stretches * heads;
    if (first < job.h) job(task / stretches, first, std::min(first + heads, job.h));
  });
}
