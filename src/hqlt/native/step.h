// One token through everything between a layer's projections, and the state after it.
//
//     own entry:  k, v or SiLU(v), β = beta_max · σ(β)      (β if the rule has one; SiLU in both memories or in one)
//     decay:      α = exp(−exp(A_log) · softplus(decay + dt_bias)), for the gated delta rule
//     FW-memory:  decay, write what the schedule requires (the own entry, the one that leaves the window, or a whole
//                 chunk), read φ(q); without a write there is no decay; with learned maps, φ(M q) and φ(N k)
//     KV-memory:  softmax over the held entries in the window, the own one, and those kept beyond the window (kept.h)
//     out:        RMSNorm(mix(FW read, KV read)) of each query head, or for the mixer `add`, γ RMSNorm(FW read) + (1 − δ) KV read
//     state:      the entries moved by one slot, the own entry in the last slot; zeros in unused slots. With full attention,
//                 a slot is added instead: in place, if keys_after is keys
//
// Held keys have no rotary embedding. Rotating k by minus its age, (c k₁ + s k₂, c k₂ − s k₁), gives the same product as
// rotating q and k by their positions: the table holds cos and sin by age, and tokens need not be counted.
//
// Each KV head has g query heads, whose numbers are adjacent; gates and outputs belong to query heads. A task is a range of
// KV heads of one row, whose numbers are adjacent within a slot: entries are read and copied in memory order. The old state
// is only read.
//
// T is the type of all computation and of sums over time (the matrix, scores); S that of the held KV entries, of inputs,
// weights and outputs: T itself, or bfloat16 with T = float. Inputs and outputs of type S are converted once for all tasks.

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

template <class T, class S>
struct OneToken {
  enum Writes { nothing, own, leaving, chunk };
  enum Rule { delta, linear, gated_delta };
  enum Activated { no_values, all_values, written_values };
  enum Mixer { alone, sum, scalar, vector, add, add_and_gate };
  static constexpr bool same = std::is_same_v<T, S>;  // whether entries need no conversion
  static constexpr T epsilon = T(1e-10);  // added to linear attention's normaliser

  int64_t b, h, g, k, v, s, s_after, window, writes, attends, activated, rule, mixer;
  Kept<T, S> kept;
  T beta_max, norm_epsilon;
  int64_t rows, rows_after;  // slots between two rows of keys (or values), before and after: at least s and s_after
  const T *q, *key, *value, *beta, *decay, *A_log, *dt_bias;  // beta, decay: logits; null if the rule has none
  const S *map_q, *map_k;                                     // learned maps [h·g, k, k] and [h, k, k]; null without them
  const T *gate, *norm;                                       // gate: logits; null if there is none
  const uint8_t* resets;                          // [b] or null
  const S *keys, *values;
  const T *betas, *state, *key_sum;
  const int64_t* position;
  const T *cos, *sin;  // null without positions
  T* out;
  S *keys_after, *values_after;
  T *betas_after, *final_state, *final_key_sum;
  int64_t* position_after;

  T scale;
  int64_t bytes;  // of the whole state
  bool streams;   // whether to write past the cache, for a large state, which is not read before the next token

  static int64_t whole(int64_t width) { return (width + L<T> - 1) / L<T>; }

  // Checks for what would crash: null or misaligned addresses, and sizes of 0.
  void check(void* const* tensors, bool inputs, bool decay, bool gate) const {
    int64_t misaligned = int64_t(position) % 8 | int64_t(position_after) % 8;
    if (kept.slots) misaligned |= int64_t(kept.positions) % 8 | int64_t(kept.positions_after) % 8;
    for (int i = 0; i < (kept.slots ? 37 : 27); ++i)
      if (tensors[i] != resets) misaligned |= int64_t(tensors[i]) % int64_t(sizeof(S));
    for (const T* x : {betas, state, key_sum, cos, sin, (const T*)betas_after, (const T*)final_state, (const T*)final_key_sum})
      misaligned |= int64_t(x) % int64_t(sizeof(T));
    for (const T* x : {kept.scores, kept.cos, kept.sin, (const T*)kept.scores_after})
      if (kept.slots) misaligned |= int64_t(x) % int64_t(sizeof(T));
    if (misaligned) throw std::invalid_argument("tensors aligned to their numbers; clone() them");
    const bool fits = b > 0 && h > 0 && g > 0 && k > 0 && v > 0 && s >= 0 && s_after >= 0 && window > 0 &&
                      rows >= s && rows_after >= s_after && (s == s_after || !holds_betas());
    const bool held = !attends || ((!s || (keys && values)) && (!s_after || (keys_after && values_after)));
    const bool written = writes == nothing || (state && final_state && (rule != linear || (key_sum && final_key_sum)));
    const bool weighed = (!holds_betas() || ((!s || betas) && (!s_after || betas_after))) && (mixer <= sum || gate) &&
                         (rule != gated_delta || (decay && writes != chunk)) && !map_q == !map_k;
    const bool stays = !kept.slots || (attends && s == s_after && kept.slots > 0 && kept.has_memory() && !kept.cos == !cos &&
                                       !(kept.asks_for_errors() && writes != own));
    if (!(fits && held && written && weighed && stays && inputs && position && position_after))
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
    bytes = b * h * ((writes ? k * v * sizeof(T) : 0) + (attends ? (s_after + kept.slots) * (k + v) * sizeof(S) : 0));
    streams = bytes >= 1 << 18 && aligned(k * sizeof(S)) && aligned(v * sizeof(S)) && aligned(int64_t(keys_after)) &&
              aligned(int64_t(values_after)) && aligned(int64_t(final_state)) && aligned(int64_t(kept.keys_after)) &&
              aligned(int64_t(kept.values_after));
  }
  INLINE void put(T* to, Lanes<T> x) const { streams ? stream(to, x) : store(to, x); }
  auto putting() const {
    return [this](S* to, const S* from, int64_t n) { put(to, from, n); };
  }
  INLINE void put(S* to, const S* from, int64_t n) const {
    if (!streams) return void(std::copy_n(from, n, to));
    constexpr int64_t vector = LANE_BYTES / sizeof(S);
    for (int64_t i = 0; i < n; i += vector) stream(reinterpret_cast<T*>(to + i), load(reinterpret_cast<const T*>(from + i)));
  }

  using KeptStretch = typename Kept<T, S>::Stretch;

  // Scratch memory for a range of heads: a row of whole(v) numbers per KV head for its value and per query head for each
  // read, softmax weights [query heads, age and kept slot], the FW-memory's slice, features and factors of its reads.
  struct Room {
    int64_t row;
    T *value, *fw, *kv, *beta, *factors, *written;
    S* stored;  // the own keys, then the own values, if S is not T
    Lanes<T>*weights, *memory;
    typename Kept<T, S>::Room kept;
  };
  Room room(int64_t heads, int64_t reach, int64_t written) const {
    const int64_t row = whole(v), weights = attends ? heads * g * whole(reach + 1 + kept.slots) : 0, entries = heads * kept.slots;
    const int64_t memory = writes ? (g + written) * whole(k) + k * widest_slice<T> : 0, wide = sizeof(int64_t) / sizeof(T);
    const int64_t values = writes && copies_values() ? written * row : 0;
    const int64_t stored = attends && !same ? whole(heads * (k + v)) : 0;
    const int64_t stays = kept.slots ? whole(heads) + whole(entries) + whole(wide * entries) + 2 * whole(k / 2) : 0;
    Lanes<T>* at = scratch<T>((1 + 2 * g) * heads * row + whole(heads) + whole(g) + values + stored + weights + memory + stays);
    const auto take = [&](int64_t vectors) { return (at += vectors) - vectors; };
    const auto numbers = [&](int64_t vectors) { return reinterpret_cast<T*>(take(vectors)); };
    T *value = numbers(heads * row), *fw = numbers(heads * g * row), *kv = numbers(heads * g * row);
    T *beta = numbers(whole(heads)), *factors = numbers(whole(g)), *active = numbers(values);
    Lanes<T>* own = take(stored);
    Room room = {row * L<T>, value, fw, kv, beta, factors, active, reinterpret_cast<S*>(own), take(weights), take(memory), {}};
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
      copy(value + (mine + head) * v, at.value + head * at.row, activated == all_values);
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
    for (int64_t reader = 0; reader < heads * g; ++reader) mix(at, row, first, reader);
    if (first == 0) position_after[row] = now + 1;
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }

  // The FW-memory's writes for one head: n entries, h rows apart.
  struct Written {
    const T *value, *beta;
    int64_t n, apart;  // strengths, h apart if each entry has its own, or one for all
    int64_t values_apart;
  };
  // Whether written values are not used as they are held.
  bool copies_values() const { return activated == written_values || (!same && writes != own); }

  void fast_weights(const Room& at, int64_t row, int64_t first, int64_t head, int64_t n, bool empty) const {
    const int64_t mine = row * h + first + head, oldest = row * s * h + first + head, width = whole(k);
    const T* strengths = holds_betas() ? betas + oldest : at.beta + head;
    const int64_t apart = holds_betas() ? h : 0;
    Lanes<T>*memory = at.memory, *features = memory + k * widest_slice<T>, *phi_q = features + n * width;
    const S* map = map_k ? map_k + (first + head) * k * k : nullptr;
    Written pairs = {at.value + head * at.row, strengths, n, apart, at.row};
    if (writes == own) {
      feature(key + mine * k, map, features);
      if (copies_values()) copy(pairs.value, at.written, true);
    } else {
      for (int64_t j = 0; j < n; ++j) feature(keys + (oldest + j * h) * k, map, features + j * width);
      for (int64_t j = 0; j < n && copies_values(); ++j)
        copy(values + (oldest + j * h) * v, at.written + j * at.row, activated == written_values);
      if constexpr (same) pairs.value = values + oldest * v, pairs.values_apart = h * v;
    }
    if (copies_values()) pairs.value = at.written, pairs.values_apart = at.row;
    for (int64_t j = 0; j < g; ++j)
      feature(q + (mine * g + j) * k, map_q ? map_q + ((first + head) * g + j) * k * k : nullptr, phi_q + j * width);

    T* squares = kept.asks_for_errors() ? &(at.kept.score[head] = 0) : nullptr;
    const Readers readers = {reinterpret_cast<const T*>(phi_q), at.factors, at.fw + head * g * at.row, at.row};
    std::fill_n(at.factors, g, scale);
    if (rule == linear) {
      const T* phi = reinterpret_cast<const T*>(features);
      T* z = final_key_sum + mine * k;
      for (int64_t i = 0; i < k; ++i) z[i] = empty ? T(0) : key_sum[mine * k + i];
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < k; ++i) z[i] += pairs.beta[j * pairs.apart] * phi[j * width * L<T> + i];
      for (int64_t j = 0; j < g; ++j) at.factors[j] = T(1) / (dot(z, readers.phi + j * width * L<T>, k) + epsilon);
    }
    const T alpha = n == 1 ? decayed(row, first + head) : T(1);
    const T* before = state + mine * k * v;
    T* after = final_state + mine * k * v;
    constexpr int wide = LANE_BYTES == 64 ? 8 : 4;
    if (g == 1 && n == 1 && !empty && v % (wide * L<T>) == 0) {
      for (int64_t slice = 0; slice < v / (wide * L<T>); ++slice)
        one_write<wide>({v, slice}, before, after, pairs, features, alpha, readers, squares);
      return;
    }
    const Slicing cut = slicing<T>(k, v, 1, 1);
    for (int64_t slice = 0; slice < cut.count; ++slice) {
      with_vectors<T>(cut.vectors, [&](auto N) {
        this->template columns<N>({v, slice}, before, after, pairs, memory, features, empty, alpha, readers, squares);
      });
    }
  }

  // The g reads of one head: φ(q), whole(k) vectors each, and factors; each read goes to a row of `out`.
  struct Readers {
    const T *phi, *factor;
    T* out;
    int64_t row;
  };

  // The writes, each predicted while the one before it is written, and the reads, over a slice of the matrix's columns. The
  // last write's pass is the first read.
  template <int N>
  void columns(Columns<T, N> at, const T* before, T* after, Written pairs, Lanes<T>* memory, const Lanes<T>* features,
               bool empty, T alpha, Readers readers, T* squares) const {
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
        const Lanes<T> value = at.load(pairs.value + j * pairs.values_apart, n), error = rule == linear ? value : value - pass.x[1][n];
        pass.x[0][n] = pairs.beta[j * pairs.apart] * error;
        if (squares) *squares += sum_of<T>(at.own(n) * error * error);
      }
      pass.w[0] = reinterpret_cast<const T*>(features + j * whole(k)), pass.w[1] = pass.w[0] + whole(k) * L<T>;
      pass(W.M, k);
    }
    UNROLL for (int n = 0; n < N; ++n) at.store(readers.out, n, readers.factor[0] * pass.x[1][n]);
    for (int64_t j = 1; j < g; ++j) {
      look.w[0] = readers.phi + j * whole(k) * L<T>;
      look(W.M, k);
      UNROLL for (int n = 0; n < N; ++n) at.store(readers.out + j * readers.row, n, readers.factor[j] * look.x[0][n]);
    }
    W.write(after);
  }

  // The same for a single write and read: full rows in memory order, one pass to predict, one to write and read.
  template <int N>
  void one_write(Columns<T, N> at, const T* before, T* after, Written pairs, const Lanes<T>* features, T alpha, Readers reader,
                 T* squares) const {
    const T *phi_k = reinterpret_cast<const T*>(features), *phi_q = reader.phi;
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
    UNROLL for (int n = 0; n < N; ++n) store(reader.out + at.begin(n), reader.factor[0] * sum[n]);
  }

  // The own entries of some heads as they are stored: keys next to each other, values `apart` numbers from each other.
  struct Own {
    const S *key, *value;
    int64_t apart;
  };
  Own own_entries(const Room& at, int64_t mine, int64_t heads) const {
    if constexpr (same) return {key + mine * k, at.value, at.row};
    else {
      S* values = at.stored + heads * k;
      convert(key + mine * k, heads * k, at.stored);
      for (int64_t head = 0; head < heads; ++head) convert(at.value + head * at.row, v, values + head * v);
      return {at.stored, values, v};
    }
  }

  // The own entry has age 0; the entry in slot i has age s − i.
  void pairs(const Room& at, int64_t row, int64_t first, int64_t heads, int64_t now, int64_t reach) const {
    const int64_t count = std::min(writes == chunk ? now % window + 1 : now + 1, s_after);
    const int64_t mine = row * h + first, vectors = whole(reach + 1 + kept.slots), width = vectors * L<T>;
    T* weights = reinterpret_cast<T*>(at.weights);  // [query heads, age], then the kept slots
    std::fill_n(weights, heads * g * width, -std::numeric_limits<T>::infinity());

    for (int64_t head = 0; head < heads; ++head)
      products(mine + head, key + (mine + head) * k, {nullptr, nullptr}, weights + head * g * width, width);
    const int64_t moved = keys_after == keys ? 0 : count - 1;  // entries that are copied
    if (keys_after != keys) clear_unused(keys_after, rows_after, row, first, heads, count, k);
    for (int64_t age = std::max(reach, moved); age > 0; --age) {
      const S* held = keys + slot(row, age, first) * k;
      prefetch(held + 2 * h * k, heads * k);
      if (age <= moved) put(keys_after + slot_after(row, age + 1, first) * k, held, heads * k);
      if (age > reach) continue;
      const Rotation<T> turn = by_age(age);
      for (int64_t head = 0; head < heads; ++head)
        products(mine + head, held + head * k, turn, weights + head * g * width + age, width);
    }
    const Own own = own_entries(at, mine, heads);
    if (count > 0) std::copy_n(own.key, heads * k, keys_after + slot_after(row, 1, first) * k);
    T* beyond = weights + reach + 1;
    const int64_t before = writes == chunk && now > 0 ? (now - 1) % window + 1 : std::min(now, s);
    const KeptStretch of = {row, first, heads, h, s, now, before, count, writes == leaving || writes == chunk};
    if (kept.slots) kept_keys(of, at, own, beyond, width);

    std::fill_n(at.kv, heads * g * at.row, T(0));
    for (int64_t reader = 0; reader < heads * g; ++reader) softmax(at.weights + reader * vectors, vectors);
    for (int64_t head = 0; head < heads; ++head) weigh(at, head, weights + head * g * width, width, at.value + head * at.row);
    if (keys_after != keys) clear_unused(values_after, rows_after, row, first, heads, count, v);
    for (int64_t age = std::max(reach, moved); age > 0; --age) {
      const S* held = values + slot(row, age, first) * v;
      prefetch(held + 2 * h * v, heads * v);
      if (age <= moved) put(values_after + slot_after(row, age + 1, first) * v, held, heads * v);
      if (age > reach) continue;
      for (int64_t head = 0; head < heads; ++head) weigh(at, head, weights + head * g * width + age, width, held + head * v);
    }
    for (int64_t head = 0; count > 0 && head < heads; ++head)
      std::copy_n(own.value + head * own.apart, v, values_after + (slot_after(row, 1, first) + head) * v);
    if (kept.slots) kept_values(of, at, own, beyond, width);

    if (!holds_betas()) return;
    clear_unused(betas_after, s_after, row, first, heads, count, 1);
    const auto beta_at = [&](int64_t age) { return ((row + 1) * s - age) * h + first; };
    for (int64_t age = 1; age < count; ++age) std::copy_n(betas + beta_at(age), heads, betas_after + beta_at(age + 1));
    if (count > 0) std::copy_n(at.beta, heads, betas_after + beta_at(1));
  }

  // Keys beyond the window: selects the entries that stay, and computes weights [heads, width] of visible ones.
  void kept_keys(const KeptStretch& of, const Room& at, Own own, T* weights, int64_t width) const {
    const int64_t mine = of.row * h + of.first, half = k / 2;
    kept.contest(of, at.kept);
    const Rotation<T> same = kept.distances == kept.as_the_window ? kept.rotation(window, half, at.kept.rotation) : Rotation<T>{nullptr, nullptr};
    const auto read = [&](int64_t slot, int64_t head, int64_t entry, const S* held) {
      const Rotation<T> turn = kept.distances == kept.in_truth ? kept.rotation(of, at.kept, entry, head, half) : same;
      products(mine + head, held, turn, weights + head * g * width + slot, width);
    };
    kept.each(of, at.kept, {kept.keys, keys, own.key, k, k, kept.keys_after}, read, putting());
    kept.write(of, at.kept);
  }

  void kept_values(const KeptStretch& of, const Room& at, Own own, const T* weights, int64_t width) const {
    const auto read = [&](int64_t slot, int64_t head, int64_t, const S* held) { weigh(at, head, weights + head * g * width + slot, width, held); };
    kept.each(of, at.kept, {kept.values, values, own.value, own.apart, v, kept.values_after}, read, putting());
  }

  // out = RMSNorm(mix(fw, kv)) of one query head, or for `add`, the mix of RMSNorm(fw) and kv.
  void mix(const Room& at, int64_t row, int64_t first, int64_t reader) const {
    const int64_t all = h * g, of_row = first * g + reader, mine = row * all + of_row;
    T *fw = at.fw + reader * at.row, *kv = at.kv + reader * at.row, *mixed = at.value, *to = out + mine * v;
    if (mixer == alone) return normed(writes ? fw : kv, to);
    if (mixer >= add) {
      const T* gamma = gate + row * all * (v + (mixer == add_and_gate)) + of_row * v;
      const T rest = mixer == add_and_gate ? 1 - gate[row * all * (v + 1) + all * v + of_row] : T(1);
      normed(fw, fw);
      for (int64_t i = 0; i < v; ++i) to[i] = gamma[i] * fw[i] + rest * kv[i];
      return;
    }
    if (mixer == vector) std::copy_n(gate + mine * v, v, mixed);
    const T fw_gate = mixer == scalar ? sigmoid(gate[row * 2 * all + of_row]) : T(1);
    const T kv_gate = mixer == scalar ? sigmoid(gate[row * 2 * all + all + of_row]) : T(1);
    for (int64_t i = 0; i < v; i += L<T>) {
      const Lanes<T> a = load(fw + i), b = load(kv + i);
      store(mixed + i, mixer == vector ? b + sigmoid<T>(load(mixed + i)) * (a - b) : fw_gate * a + kv_gate * b);
    }
    normed(mixed, to);
  }

 private:
  int64_t slot(int64_t row, int64_t age, int64_t head) const { return (row * rows + s - age) * h + head; }
  int64_t slot_after(int64_t row, int64_t age, int64_t head) const { return (row * rows_after + s_after - age) * h + head; }

  template <class N>
  void clear_unused(N* after, int64_t rows, int64_t row, int64_t first, int64_t heads, int64_t count, int64_t width) const {
    for (int64_t i = 0; i < s_after - count; ++i) std::fill_n(after + ((row * rows + i) * h + first) * width, heads * width, N(0));
  }

  void normed(const T* from, T* to) const {
    if (!norm) return void(std::copy_n(from, from == to ? 0 : v, to));
    const T inverse = 1 / std::sqrt(dot(from, from, v) / v + norm_epsilon);
    for (int64_t i = 0; i < v; ++i) to[i] = from[i] * inverse * norm[i];
  }

  // Copies a value, activated or not, to a row of full vectors.
  template <class N>
  void copy(const N* from, T* to, bool silu) const {
    convert(from, v, to);
    for (int64_t i = 0; silu && i < v; i += L<T>) store(to + i, load(to + i) * sigmoid<T>(load(to + i)));
  }

  // φ of a row, mapped first if there is a map [k, k]: SiLU(x) / √(‖SiLU(x)‖² + 1e-6) for the delta rule, elu(x) + 1 for the
  // additive one.
  template <class N>
  void feature(const N* row, const S* map, Lanes<T>* to) const {
    T* x = reinterpret_cast<T*>(to);
    if (!map) convert(row, k, x);
    for (int64_t i = 0; map && i < k; ++i) x[i] = dot_as<T>(map + i * k, row, k);
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

  // Scaled products of a key, with its rotation, and the g queries of its head (a number over all rows), `apart` numbers from
  // each other. k₁, k₂ and q₁, q₂ are the halves of a head.
  template <class N>
  INLINE void products(int64_t head, const N* key, Rotation<T> turn, T* to, int64_t apart) const {
    const T* queries = q + head * g * k;
    int64_t j = 0;
    for (; j + 3 <= g; j += 3) some_products<3>(queries + j * k, key, turn, to + j * apart, apart);
    if (j + 2 == g) some_products<2>(queries + j * k, key, turn, to + j * apart, apart);
    else if (j < g) some_products<1>(queries + j * k, key, turn, to + j * apart, apart);
  }
  template <int G, class N>
  INLINE void some_products(const T* q, const N* key, Rotation<T> turn, T* to, int64_t apart) const {
    const T *c = turn.cos, *s = turn.sin;
    const int64_t half = k / 2;
    Lanes<T> sums[G] = {};
    T rest[G] = {};
    int64_t i = 0;
    if (c) {
      for (; i + L<T> <= half; i += L<T>) {
        const Lanes<T> k1 = load_as<T>(key + i), k2 = load_as<T>(key + half + i), ci = load(c + i), si = load(s + i);
        const Lanes<T> x1 = ci * k1 + si * k2, x2 = ci * k2 - si * k1;
        UNROLL for (int j = 0; j < G; ++j) sums[j] += load(q + j * k + i) * x1 + load(q + j * k + half + i) * x2;
      }
      for (; i < half; ++i) {
        const T x1 = c[i] * key[i] + s[i] * key[half + i], x2 = c[i] * key[half + i] - s[i] * key[i];
        UNROLL for (int j = 0; j < G; ++j) rest[j] += q[j * k + i] * x1 + q[j * k + half + i] * x2;
      }
    } else {
      for (; i + L<T> <= k; i += L<T>) {
        const Lanes<T> x = load_as<T>(key + i);
        UNROLL for (int j = 0; j < G; ++j) sums[j] += load(q + j * k + i) * x;
      }
      for (; i < k; ++i)
        UNROLL for (int j = 0; j < G; ++j) rest[j] += q[j * k + i] * key[i];
    }
    UNROLL for (int j = 0; j < G; ++j) to[j * apart] = scale * (rest[j] + sum_of<T>(sums[j]));
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

  // Adds a value, weighted, to the KV reads of the g queries of a head (counted from the task's first).
  template <class N>
  INLINE void weigh(const Room& at, int64_t head, const T* weights, int64_t apart, const N* value) const {
    for (int64_t j = 0; j < g; ++j) {
      T* to = at.kv + (head * g + j) * at.row;
      const T weight = weights[j * apart];
      int64_t i = 0;
      for (; i + L<T> <= v; i += L<T>) store(to + i, load(to + i) + weight * load_as<T>(value + i));
      for (; i < v; ++i) to[i] += weight * value[i];
    }
  }
};

// Inputs of type S as type T, in memory of their own; themselves if the types are the same. Null stays null.
template <class T, class S>
struct Converted {
  std::vector<std::unique_ptr<T[]>> rows;
  const T* operator()(const void* given, int64_t n) {
    const S* from = static_cast<const S*>(given);
    if constexpr (std::is_same_v<T, S>) return from;
    else {
      if (!from) return nullptr;
      rows.push_back(std::make_unique<T[]>(n));
      convert(from, n, rows.back().get());
      return rows.back().get();
    }
  }
};

template <class T, class S>
void one_token(int threads, const OneTokenJob& packed) {
  const int64_t* n = packed.sizes;
  const double* factor = packed.factors;
  OneToken<T, S> job = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12],
                        {n[13], n[14], n[15], n[16], n[17]}, T(factor[0]), T(factor[1]), packed.rows, packed.rows_after};
  Kept<T, S>& kept = job.kept;
  const void *q, *key, *value, *beta, *decay, *A_log, *dt_bias, *gate, *norm;
  S* out;
  void* const* next = from(packed.tensors, q, key, value, beta, decay, A_log, dt_bias, job.map_q, job.map_k, gate, norm, job.resets,
                           job.keys, job.values, job.betas, job.state, job.key_sum, job.position);
  if (kept.slots) next = from(next, kept.keys, kept.values, kept.positions, kept.scores);
  next = from(next, job.cos, job.sin);
  if (kept.slots) next = from(next, kept.cos, kept.sin);
  next = from(next, out, job.keys_after, job.values_after, job.betas_after, job.final_state, job.final_key_sum, job.position_after);
  if (kept.slots) from(next, kept.keys_after, kept.values_after, kept.positions_after, kept.scores_after);
  job.check(packed.tensors, q && key && value && out, decay && A_log && dt_bias, gate);

  const int64_t heads = job.b * job.h, readers = heads * job.g, outputs = readers * job.v;
  Converted<T, S> as_T;
  job.q = as_T(q, readers * job.k), job.key = as_T(key, heads * job.k), job.value = as_T(value, heads * job.v);
  job.beta = as_T(beta, heads), job.decay = as_T(decay, heads), job.A_log = as_T(A_log, job.h), job.dt_bias = as_T(dt_bias, job.h);
  job.gate = as_T(gate, job.mixer == job.scalar ? 2 * readers : outputs + (job.mixer == job.add_and_gate ? readers : 0));
  job.norm = as_T(norm, job.v);
  job.out = const_cast<T*>(as_T(out, outputs));
  job.prepare();
  if (job.bytes < 4 << 20) threads = 1;  // for a small state, waking a second thread takes longer than it saves
  const int64_t stretches = kept.alike ? 1 : std::min((threads + job.b - 1) / job.b, job.h), many = (job.h + stretches - 1) / stretches;
  Pool::run(threads, job.b * stretches, [&](int64_t task) {
    const int64_t first = task % stretches * many;
    if (first < job.h) job(task / stretches, first, std::min(first + many, job.h));
  });
  if constexpr (!std::is_same_v<T, S>) convert(job.out, outputs, out);
}
