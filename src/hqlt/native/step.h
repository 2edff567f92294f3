// One token through everything between a layer's projections, and the state after it.
//
//     own entry:  k, SiLU(v), β = beta_max · σ(β)      (SiLU if there is an FW-memory, β if its rule has one)
//     decay:      α = exp(−exp(A_log) · softplus(decay + dt_bias)), for the gated delta rule
//     FW-memory:  decay, write what the schedule requires (the own entry, the one that leaves the window, or a whole
//                 chunk), read φ(q); without a write there is no decay
//     KV-memory:  softmax over the held entries in the window, the own one, and those kept beyond the window (kept.h)
//     out:        RMSNorm(mix(FW read, KV read)) of each head
//     state:      the entries moved by one slot, the own entry in the last slot; zeros in unused slots
//
// Held keys have no rotary embedding. Rotating q by the age of an entry, (c q₁ − s q₂, c q₂ + s q₁), gives the same product
// as rotating both by their positions: the table holds cos and sin by age, and tokens need not be counted.
//
// A task is a range of heads of one row, whose numbers are adjacent within a slot: entries are read and copied in memory
// order. The old state is only read.

template <class T>
T sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}

// A store that does not first load the overwritten memory into the cache. `to` is aligned to a vector.
template <class T>
INLINE void stream(T* to, Lanes<T> x) {
#if !defined(__x86_64__)
  store(to, x);
#elif LANE_BYTES == 64
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)x);
#elif LANE_BYTES == 32
  _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)x);
#else
  _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)x);
#endif
}

template <class T>
struct OneToken {
  enum Writes { nothing, own, leaving, chunk };
  enum Rule { delta, linear, gated_delta };
  enum Mixer { alone, sum, scalar, vector };
  static constexpr T epsilon = T(1e-10);  // added to linear attention's normaliser

  int64_t b, h, k, v, s, s_after, window, writes, attends, rule, mixer;
  Kept<T> kept;
  T beta_max, norm_epsilon;
  const T *q, *key, *value, *beta, *decay, *A_log, *dt_bias;  // beta, decay: logits; null if the rule has none
  const T *gate, *norm;                                       // gate: logits; null if there is none
  const uint8_t* resets;                          // [b] or null
  const T *keys, *values, *betas, *state, *key_sum;
  const int64_t* position;
  const T *cos, *sin;  // null without positions
  T *out, *keys_after, *values_after, *betas_after, *final_state, *final_key_sum;
  int64_t* position_after;

  T scale;
  int64_t bytes;  // of the whole state
  bool streams;   // whether to write past the cache, for a large state, which is not read before the next token

  static int64_t whole(int64_t width) { return (width + L<T> - 1) / L<T>; }

  // Checks for what would crash: null or misaligned addresses, and sizes of 0.
  void check(void* const* tensors) const {
    int64_t misaligned = int64_t(position) % 8 | int64_t(position_after) % 8;
    if (kept.slots) misaligned |= int64_t(kept.positions) % 8 | int64_t(kept.positions_after) % 8;
    for (int i = 0; i < (kept.slots ? 35 : 25); ++i)
      if (tensors[i] != resets) misaligned |= int64_t(tensors[i]) % int64_t(sizeof(T));
    if (misaligned) throw std::invalid_argument("tensors aligned to their numbers; clone() them");
    const bool fits = b > 0 && h > 0 && k > 0 && v > 0 && s >= 0 && s_after >= 0 && window > 0;
    const bool held = !attends || ((!s || (keys && values)) && (!s_after || (keys_after && values_after)));
    const bool written = writes == nothing || (state && final_state && (rule != linear || (key_sum && final_key_sum)));
    const bool weighed = (!holds_betas() || ((!s || betas) && (!s_after || betas_after))) && (mixer <= sum || gate) &&
                         (rule != gated_delta || (decay && A_log && dt_bias && writes != chunk));
    const bool stays = !kept.slots || (attends && s == s_after && kept.slots > 0 && kept.has_memory() && !kept.cos == !cos &&
                                       !(kept.asks_for_errors() && writes != own));
    if (!(fits && held && written && weighed && stays && q && key && value && position && out && position_after))
      throw std::invalid_argument("sizes of at least 1, and tensors with memory");
  }

  bool holds_betas() const { return writes == chunk && rule == delta; }

  // α of a head, if the token's own entry is written.
  T decayed(int64_t row, int64_t head) const {
    if (rule != gated_delta) return T(1);
    const T logit = decay[row * h + head] + dt_bias[head], softplus = std::max(logit, T(0)) + std::log1p(std::exp(-std::abs(logit)));
    return std::exp(-std::exp(A_log[head]) * softplus);
  }

  void prepare() {
    const auto aligned = [](int64_t address) { return address % LANE_BYTES == 0; };
    scale = 1 / std::sqrt(T(k));
    bytes = b * h * ((writes ? k * v : 0) + (attends ? (s_after + kept.slots) * (k + v) : 0)) * int64_t(sizeof(T));
    streams = bytes >= 1 << 18 && aligned(k * sizeof(T)) && aligned(v * sizeof(T)) && aligned(int64_t(keys_after)) &&
              aligned(int64_t(values_after)) && aligned(int64_t(final_state)) && aligned(int64_t(kept.keys_after)) &&
              aligned(int64_t(kept.values_after));
  }
  INLINE void put(T* to, Lanes<T> x) const { streams ? stream(to, x) : store(to, x); }
  auto putting() const {
    return [this](T* to, const T* from, int64_t n) { put(to, from, n); };
  }
  INLINE void put(T* to, const T* from, int64_t n) const {
    if (!streams) return void(std::copy_n(from, n, to));
    for (int64_t i = 0; i < n; i += L<T>) stream(to + i, load(from + i));
  }

  using KeptStretch = typename Kept<T>::Stretch;

  // Scratch memory for a range of heads: a row of whole(v) numbers per head, softmax weights [heads, age and kept slot],
  // the FW-memory's slice and features.
  struct Room {
    int64_t row;
    T *value, *fw, *kv, *beta;
    Lanes<T>*weights, *memory;
    typename Kept<T>::Room kept;
  };
  Room room(int64_t heads, int64_t reach, int64_t written) const {
    const int64_t row = whole(v), weights = attends ? heads * whole(reach + 1 + kept.slots) : 0, entries = heads * kept.slots;
    const int64_t memory = writes ? (1 + written) * whole(k) + k * widest_slice<T> : 0, wide = sizeof(int64_t) / sizeof(T);
    const int64_t stays = kept.slots ? whole(heads) + whole(entries) + whole(wide * entries) + 2 * whole(k / 2) : 0;
    Lanes<T>* at = scratch<T>(3 * heads * row + whole(heads) + weights + memory + stays);
    const auto take = [&](int64_t vectors) { return (at += vectors) - vectors; };
    const auto numbers = [&](int64_t vectors) { return reinterpret_cast<T*>(take(vectors)); };
    T *value = numbers(heads * row), *fw = numbers(heads * row), *kv = numbers(heads * row), *beta = numbers(whole(heads));
    Room room = {row * L<T>, value, fw, kv, beta, take(weights), take(memory), {}};
    if (kept.slots) {
      room.kept = {numbers(whole(heads)), numbers(whole(entries)), numbers(2 * whole(k / 2)), nullptr};
      room.kept.stays = reinterpret_cast<int64_t*>(take(whole(wide * entries)));
    }
    return room;
  }

  void operator()(int64_t row, int64_t first, int64_t last) const {
    const bool reset = resets && resets[row];
    const int64_t now = reset ? 0 : std::max<int64_t>(position[row], 0), mine = row * h + first, heads = last - first;
    const bool full = s == window && now >= window;  // for a delayed blend: the oldest entry leaves
    const int64_t written = writes == own || (writes == leaving && full) ? 1 : writes == chunk && full && now % window == 0 ? s : 0;
    const int64_t since = writes == chunk ? now % window : std::min(now, window - 1), reach = std::min(since, s);
    const Room at = room(heads, reach, written);

    for (int64_t head = 0; head < heads; ++head) {
      activate(value + (mine + head) * v, at.value + head * at.row);
      at.beta[head] = beta ? beta_max * sigmoid(beta[mine + head]) : T(1);
    }
    if (writes)
      for (int64_t head = 0; head < heads; ++head)
        fast_weights(at, row, first, head, written, reset || (writes == chunk && now == 0));
    for (int64_t head = 0; kept.slots && head < heads; ++head) {
      T& score = at.kept.score[head];  // still the sum of squares of the error
      score = kept.score(now, first + head, h, score, at.beta[head], at.value + head * at.row, v);
    }
    if (kept.slots) kept.settle(now, heads, at.kept.score);
    if (attends) pairs(at, row, first, heads, now, reach);
    for (int64_t head = 0; head < heads; ++head) mix(at, row, first, head);
    if (first == 0) position_after[row] = now + 1;
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }

  // The FW-memory's writes for one head: n entries, h rows apart.
  struct Written {
    const T *key, *value, *beta;
    int64_t n, apart;  // strengths, h apart if each entry has its own, or one for all
  };

  void fast_weights(const Room& at, int64_t row, int64_t first, int64_t head, int64_t n, bool empty) const {
    const int64_t mine = row * h + first + head, oldest = row * s * h + first + head, width = whole(k);
    const T* strengths = holds_betas() ? betas + oldest : at.beta + head;
    const int64_t apart = holds_betas() ? h : 0;
    const Written pairs = writes == own ? Written{key + mine * k, at.value + head * at.row, strengths, n, apart}
                                        : Written{keys + oldest * k, values + oldest * v, strengths, n, apart};
    T* fw = at.fw + head * at.row;
    Lanes<T>*memory = at.memory, *features = memory + k * widest_slice<T>, *reader = features + n * width;
    for (int64_t j = 0; j < n; ++j) feature(pairs.key + j * h * k, features + j * width);
    feature(q + mine * k, reader);

    T* squares = kept.asks_for_errors() ? &(at.kept.score[head] = 0) : nullptr;
    T factor = scale;
    if (rule == linear) {
      const T* phi = reinterpret_cast<const T*>(features);
      T* z = final_key_sum + mine * k;
      for (int64_t i = 0; i < k; ++i) z[i] = empty ? T(0) : key_sum[mine * k + i];
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < k; ++i) z[i] += pairs.beta[j * pairs.apart] * phi[j * width * L<T> + i];
      factor = T(1) / (dot(z, reinterpret_cast<const T*>(reader), k) + epsilon);
    }
    const T alpha = n == 1 ? decayed(row, first + head) : T(1);
    const T* before = state + mine * k * v;
    T* after = final_state + mine * k * v;
    constexpr int wide = LANE_BYTES == 64 ? 8 : 4;
    if (n == 1 && !empty && v % (wide * L<T>) == 0) {
      for (int64_t slice = 0; slice < v / (wide * L<T>); ++slice)
        one_write<wide>({v, slice}, before, after, pairs, features, alpha, factor, fw, squares);
      return;
    }
    const Slicing cut = slicing<T>(k, v, 1, 1);
    for (int64_t slice = 0; slice < cut.count; ++slice) {
      with_vectors<T>(cut.vectors, [&](auto N) {
        this->template columns<N>({v, slice}, before, after, pairs, memory, features, empty, alpha, factor, fw, squares);
      });
    }
  }

  // The writes, each predicted while the one before it is written, and the read, over a slice of the matrix's columns.
  template <int N>
  void columns(Columns<T, N> at, const T* before, T* after, Written pairs, Lanes<T>* memory, const Lanes<T>* features,
               bool empty, T alpha, T factor, T* fw, T* squares) const {
    Slice<T, N> W{at, k, memory};
    if (empty) W.clear();
    else W.read(before);
    for (int64_t i = 0; alpha != T(1) && i < k * N; ++i) W.M[i] *= alpha;
    Pass<T, N, read> look;
    look.w[0] = reinterpret_cast<const T*>(features);
    look(W.M, k);
    Pass<T, N, write, read> pass;
    UNROLL for (int n = 0; n < N; ++n) pass.x[1][n] = look.x[0][n];
    for (int64_t j = 0; j < pairs.n; ++j) {
      UNROLL for (int n = 0; n < N; ++n) {
        const Lanes<T> value = at.load(pairs.value + j * h * v, n), error = rule == linear ? value : value - pass.x[1][n];
        pass.x[0][n] = pairs.beta[j * pairs.apart] * error;
        if (squares) *squares += sum_of<T>(at.own(n) * error * error);
      }
      pass.w[0] = reinterpret_cast<const T*>(features + j * whole(k)), pass.w[1] = pass.w[0] + whole(k) * L<T>;
      pass(W.M, k);
    }
    UNROLL for (int n = 0; n < N; ++n) at.store(fw, n, factor * pass.x[1][n]);
    W.write(after);
  }

  // The same for a single write: full rows in memory order, one pass to predict, one to write and read.
  template <int N>
  void one_write(Columns<T, N> at, const T* before, T* after, Written pairs, const Lanes<T>* features, T alpha, T factor,
                 T* fw, T* squares) const {
    const T *phi_k = reinterpret_cast<const T*>(features), *phi_q = reinterpret_cast<const T*>(features + whole(k));
    const T* W = before + at.begin(0);
    T* to = after + at.begin(0);
    Lanes<T> sum[N] = {}, correction[N];
    if (rule != linear)
      for (int64_t i = 0; i < k; ++i)
        UNROLL for (int n = 0; n < N; ++n) sum[n] += phi_k[i] * load(W + i * v + n * L<T>);
    UNROLL for (int n = 0; n < N; ++n) {
      const Lanes<T> error = load(pairs.value + at.begin(n)) - alpha * sum[n];
      correction[n] = pairs.beta[0] * error;
      if (squares) *squares += sum_of<T>(error * error);
      sum[n] = Lanes<T>{};
    }
    for (int64_t i = 0; i < k; ++i) {
      prefetch(W + (k + i) * v, N * L<T>);  // the next head's matrix
      UNROLL for (int n = 0; n < N; ++n) {
        const Lanes<T> w = alpha * load(W + i * v + n * L<T>) + phi_k[i] * correction[n];
        put(to + i * v + n * L<T>, w);
        sum[n] += phi_q[i] * w;
      }
    }
    UNROLL for (int n = 0; n < N; ++n) store(fw + at.begin(n), factor * sum[n]);
  }

  // The own entry has age 0; the entry in slot i has age s − i.
  void pairs(const Room& at, int64_t row, int64_t first, int64_t heads, int64_t now, int64_t reach) const {
    const int64_t count = std::min(writes == chunk ? now % window + 1 : now + 1, s_after);
    const int64_t mine = row * h + first, vectors = whole(reach + 1 + kept.slots), width = vectors * L<T>;
    T* weights = reinterpret_cast<T*>(at.weights);  // [heads, age], then the kept slots
    std::fill_n(weights, heads * width, -std::numeric_limits<T>::infinity());

    for (int64_t head = 0; head < heads; ++head)
      weights[head * width] = scale * dot(q + (mine + head) * k, key + (mine + head) * k, k);
    clear_unused(keys_after, row, first, heads, count, k);
    for (int64_t age = std::max(reach, count - 1); age > 0; --age) {
      const T* held = keys + slot(row, s, age, first) * k;
      prefetch(held + 2 * h * k, heads * k);
      if (age < count) put(keys_after + slot(row, s_after, age + 1, first) * k, held, heads * k);
      if (age > reach) continue;
      const Rotation<T> turn = by_age(age);
      for (int64_t head = 0; head < heads; ++head)
        weights[head * width + age] = scale * product(q + (mine + head) * k, held + head * k, turn);
    }
    if (count > 0) std::copy_n(key + mine * k, heads * k, keys_after + slot(row, s_after, 1, first) * k);
    T* beyond = weights + reach + 1;
    const int64_t before = writes == chunk && now > 0 ? (now - 1) % window + 1 : std::min(now, s);
    const KeptStretch of = {row, first, heads, h, s, now, before, count, writes == leaving || writes == chunk};
    if (kept.slots) kept_keys(of, at, beyond, width);

    for (int64_t head = 0; head < heads; ++head) {
      softmax(at.weights + head * vectors, vectors);
      std::fill_n(at.kv + head * at.row, v, T(0));
      add(at.kv + head * at.row, weights[head * width], at.value + head * at.row);
    }
    clear_unused(values_after, row, first, heads, count, v);
    for (int64_t age = std::max(reach, count - 1); age > 0; --age) {
      const T* held = values + slot(row, s, age, first) * v;
      prefetch(held + 2 * h * v, heads * v);
      if (age < count) put(values_after + slot(row, s_after, age + 1, first) * v, held, heads * v);
      if (age > reach) continue;
      for (int64_t head = 0; head < heads; ++head)
        add(at.kv + head * at.row, weights[head * width + age], held + head * v);
    }
    for (int64_t head = 0; count > 0 && head < heads; ++head)
      std::copy_n(at.value + head * at.row, v, values_after + (slot(row, s_after, 1, first) + head) * v);
    if (kept.slots) kept_values(of, at, beyond, width);

    if (!holds_betas()) return;
    clear_unused(betas_after, row, first, heads, count, 1);
    for (int64_t age = 1; age < count; ++age)
      std::copy_n(betas + slot(row, s, age, first), heads, betas_after + slot(row, s_after, age + 1, first));
    if (count > 0) std::copy_n(at.beta, heads, betas_after + slot(row, s_after, 1, first));
  }

  // Keys beyond the window: selects the entries that stay, and computes weights [heads, width] of visible ones.
  void kept_keys(const KeptStretch& of, const Room& at, T* weights, int64_t width) const {
    const int64_t mine = of.row * h + of.first, half = k / 2;
    kept.contest(of, at.kept);
    const Rotation<T> same = kept.distances == Kept<T>::as_the_window ? kept.rotation(window, half, at.kept.rotation) : Rotation<T>{nullptr, nullptr};
    const auto read = [&](int64_t slot, int64_t head, int64_t entry, const T* held) {
      const Rotation<T> turn = kept.distances == Kept<T>::in_truth ? kept.rotation(of, at.kept, entry, head, half) : same;
      weights[head * width + slot] = scale * product(q + (mine + head) * k, held, turn);
    };
    kept.each(of, at.kept, {kept.keys, keys, key + mine * k, k, k, kept.keys_after}, read, putting());
    kept.write(of, at.kept);
  }

  void kept_values(const KeptStretch& of, const Room& at, const T* weights, int64_t width) const {
    const auto read = [&](int64_t slot, int64_t head, int64_t, const T* held) { add(at.kv + head * at.row, weights[head * width + slot], held); };
    kept.each(of, at.kept, {kept.values, values, at.value, at.row, v, kept.values_after}, read, putting());
  }

  // out = RMSNorm(mix(fw, kv)) of one head.
  void mix(const Room& at, int64_t row, int64_t first, int64_t head) const {
    const int64_t mine = row * h + first + head;
    const T *fw = at.fw + head * at.row, *kv = at.kv + head * at.row;
    T *mixed = at.value + head * at.row, *to = out + mine * v;
    if (mixer == alone) std::copy_n(writes ? fw : kv, v, mixed);
    else if (mixer == vector) std::copy_n(gate + mine * v, v, mixed);
    const T fw_gate = mixer == scalar ? sigmoid(gate[row * 2 * h + first + head]) : T(1);
    const T kv_gate = mixer == scalar ? sigmoid(gate[row * 2 * h + h + first + head]) : T(1);
    for (int64_t i = 0; mixer != alone && i < v; i += L<T>) {
      const Lanes<T> a = load(fw + i), b = load(kv + i);
      store(mixed + i, mixer == vector ? b + sigmoid<T>(load(mixed + i)) * (a - b) : fw_gate * a + kv_gate * b);
    }
    if (!norm) return void(std::copy_n(mixed, v, to));
    const T inverse = 1 / std::sqrt(dot(mixed, mixed, v) / v + norm_epsilon);
    for (int64_t i = 0; i < v; ++i) to[i] = mixed[i] * inverse * norm[i];
  }

 private:
  int64_t slot(int64_t row, int64_t slots, int64_t age, int64_t head) const { return (row * slots + slots - age) * h + head; }

  void clear_unused(T* after, int64_t row, int64_t first, int64_t heads, int64_t count, int64_t width) const {
    for (int64_t i = 0; i < s_after - count; ++i) std::fill_n(after + ((row * s_after + i) * h + first) * width, heads * width, T(0));
  }

  // The token's own value, as the memories hold it.
  void activate(const T* from, T* to) const {
    std::copy_n(from, v, to);
    for (int64_t i = 0; writes && i < v; i += L<T>) store(to + i, load(to + i) * sigmoid<T>(load(to + i)));
  }

  // φ of a row: SiLU(x) / √(‖SiLU(x)‖² + 1e-6) for the delta rule, elu(x) + 1 for the additive one.
  void feature(const T* row, Lanes<T>* to) const {
    T* x = reinterpret_cast<T*>(to);
    std::copy_n(row, k, x);
    std::fill_n(x + k, whole(k) * L<T> - k, T(0));
    for (int64_t n = 0; n < whole(k); ++n) {
      const Lanes<T> at = to[n];
      if (rule == linear) to[n] = at > T(0) ? at + T(1) : exponential<T>(at);
      else to[n] = at * sigmoid<T>(at);
    }
    if (rule == linear) return;
    const T inverse = T(1) / std::sqrt(dot(x, x, k) + T(1e-6));
    for (int64_t n = 0; n < whole(k); ++n) to[n] *= inverse;
  }

  Rotation<T> by_age(int64_t age) const { return cos ? Rotation<T>{cos + age * (k / 2), sin + age * (k / 2)} : Rotation<T>{nullptr, nullptr}; }

  // q·k for an older k, with its rotation: q₁, q₂ and k₁, k₂ are the halves of a head.
  INLINE T product(const T* q, const T* key, Rotation<T> turn) const {
    const T *c = turn.cos, *s = turn.sin;
    if (!c) return dot(q, key, k);
    const int64_t half = k / 2;
    Lanes<T> sums = {};
    int64_t i = 0;
    for (; i + L<T> <= half; i += L<T>) {
      const Lanes<T> q1 = load(q + i), q2 = load(q + half + i), ci = load(c + i), si = load(s + i);
      sums += load(key + i) * (ci * q1 - si * q2) + load(key + half + i) * (ci * q2 + si * q1);
    }
    T sum = 0;
    for (; i < half; ++i) sum += key[i] * (c[i] * q[i] - s[i] * q[half + i]) + key[half + i] * (c[i] * q[half + i] + s[i] * q[i]);
    return sum + sum_of<T>(sums);
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
void one_token(int threads, const OneTokenJob& packed) {
  const int64_t* n = packed.sizes;
  const double* factor = packed.factors;
  OneToken<T> job = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], {n[11], n[12], n[13], n[14], n[15]}, T(factor[0]), T(factor[1])};
  Kept<T>& kept = job.kept;
  void* const* next = from(packed.tensors, job.q, job.key, job.value, job.beta, job.decay, job.A_log, job.dt_bias, job.gate, job.norm,
                           job.resets, job.keys, job.values, job.betas, job.state, job.key_sum, job.position);
  if (kept.slots) next = from(next, kept.keys, kept.values, kept.positions, kept.scores);
  next = from(next, job.cos, job.sin);
  if (kept.slots) next = from(next, kept.cos, kept.sin);
  next = from(next, job.out, job.keys_after, job.values_after, job.betas_after, job.final_state, job.final_key_sum, job.position_after);
  if (kept.slots) from(next, kept.keys_after, kept.values_after, kept.positions_after, kept.scores_after);
  job.check(packed.tensors);
  job.prepare();
  if (job.bytes < 4 << 20) threads = 1;  // for a small state, waking a second thread takes longer than it saves
  const int64_t stretches = kept.alike ? 1 : std::min((threads + job.b - 1) / job.b, job.h), heads = (job.h + stretches - 1) / stretches;
  Pool::run(threads, job.b * stretches, [&](int64_t task) {
    const int64_t first = task % stretches * heads;
    if (first < job.h) job(task / stretches, first, std::min(first + heads, job.h));
  });
}
