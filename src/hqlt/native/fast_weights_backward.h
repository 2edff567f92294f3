// The gradients of fast weights. G is the gradient of S after a write; G⁻ and S⁻ are those before it, after the decay:
//
//     du = Gᵀ k (that of β r)     dβ = du · r     dv = β du     dk = β G r     da = −S⁻ dv     G⁻ = G − a ⊗ dv
//     dq = scale · S dout         G ← α ⊙ G⁻ + scale · q ⊗ dout, one token earlier
//
// Given r and dv, every step only decays a matrix and adds products to it, so that S is rebuilt forwards from the initial
// state: only r is saved, and nothing is inverted. One sweep runs over G backwards in time, then one over the transpose of
// S forwards, so that the sums over v (dq, da) are elementwise over lanes; G r takes one horizontal sum per row.
//
// The gradient of log α_t is P_t = Σ_v G⁻ ⊙ S⁻ at the token's first write. It needs no sweep that holds both:
//
//     P_t = P_{t+1} + q ⊙ dq + Σ_writes (a ⊙ da − k ⊙ dk)        or, summed over rows, P_{t+1} + out · dout − Σ v · dv
//
// starting from P = Σ_v d_final ⊙ final after the last token, and from 0 at the end of earlier segments.

// Accumulators of one task for sums over all columns: dk without the part of a, dβ, and d log α of a matrix.
template <class T>
struct Sums {
  T *d_key, *d_beta, *d_decay;
  bool first;  // nothing is accumulated yet
};

// Sweep backwards in time over columns of G: dv, the gradient of the initial state, and these columns' part of the sums.
template <class T, Decays decays, bool erases, int N>
struct BackwardColumns {
  using Job = FastWeights<T, decays, erases>;
  const Job& job;
  const typename Job::Rows rows;
  const Columns<T, N> columns;
  const Sums<T> sums;
  Slice<T, N> G;
  T gamma = 1;                                  // of G
  Lanes<T> own[N], d_error[N] = {}, d_read[N];  // d_error: dv of the write after the current one
  Lanes<T> product = {};                        // P

  BackwardColumns(const Job& job, int64_t head, int64_t slice, Sums<T> sums)
      : job(job), rows(job, head), columns{job.v, slice}, sums(sums), G{columns, job.k, scratch<T>(job.k * N)} {
    const int64_t matrix = head * job.k * job.v;
    G.read(job.d_final + matrix);
    UNROLL for (int n = 0; n < N; ++n) own[n] = columns.own(n);
    if (decays == Decays::matrix)
      for (int64_t row = 0; row < job.k; ++row)
        UNROLL for (int n = 0; n < N; ++n) product += own[n] * G.M[row * N + n] * columns.load(job.final_state + matrix + row * job.v, n);
    for (int64_t i = job.t - 1; i >= 0; --i) {
      const bool last = i + 1 == job.t || rows.reset(i + 1);  // last of its segment: nothing later is used
      if (i > 1) fetch(i - 2);
      if (last && i + 1 < job.t) {
        G.clear(), gamma = 1;
        UNROLL for (int n = 0; n < N; ++n) d_error[n] = Lanes<T>{};
        product = Lanes<T>{};
      }
      token(i, last);
    }
    Pass<T, N, erases ? write : skip, Job::fade> begin;
    settle(begin, 0);
    if (rows.reset(0)) G.clear();
    G.write(job.d_state + matrix);
  }

  // G − a ⊗ dv of write m·i, decayed by token i: the gradient of the matrix before that token.
  template <class Pass>
  INLINE void settle(Pass& pass, int64_t i) {
    UNROLL for (int n = 0; n < N; ++n) pass.x[0][n] = -1 / gamma * d_error[n];
    pass.w[0] = rows.erase(i * job.m);
    rows.decay(pass, 1, i);
    if (decays == Decays::matrix) {
      UNROLL for (int n = 0; n < N; ++n) pass.x[1][n] *= gamma;
      gamma = 1;
    }
    pass(G.M, job.k);
  }

  INLINE void token(int64_t i, bool last) {
    const int64_t first = (i + 1) * job.m - 1, query = rows.query(i), later = last ? job.t : i + 1;
    bool settled = false;
    for (int64_t other = query + 1; other < query + job.g; ++other) {
      d_read_of(other);
      if (decays != Decays::nothing && !settled && later < job.t) {
        Pass<T, N, erases ? write : skip, Job::fade, write> pass;
        UNROLL for (int n = 0; n < N; ++n) pass.x[2][n] = d_read[n];
        pass.w[2] = job.q + other * job.k;
        settle(pass, later);
        settled = true;
        UNROLL for (int n = 0; n < N; ++n) d_error[n] = Lanes<T>{};
      } else {
        Pass<T, N, write> pass;
        UNROLL for (int n = 0; n < N; ++n) pass.x[0][n] = 1 / gamma * d_read[n];
        pass.w[0] = job.q + other * job.k;
        pass(G.M, job.k);
      }
    }
    d_read_of(query);
    one_write<true>(first, later == job.t ? first : first + 1, rows.alpha(settled ? job.t : later), job.q + query * job.k);
    for (int64_t j = first - 1; j >= i * job.m; --j) one_write<false>(j, j + 1, nullptr, nullptr);
    if (decays != Decays::matrix) return;
    const T sum = rows.live(i) && !rows.reset(i) ? sum_of<T>(product) : T(0);
    T& total = sums.d_decay[rows.token(i)];
    total = sums.first ? sum : total + sum;
  }

  INLINE void d_read_of(int64_t query) {
    UNROLL for (int n = 0; n < N; ++n) {
      d_read[n] = columns.load(job.d_out + query * job.v, n);
      if (decays == Decays::matrix) product += own[n] * d_read[n] * columns.load(job.out + query * job.v, n);
      d_read[n] *= job.scale;
    }
  }

  // One write; with the token's last, also its decay and read. later: the write after it, whose d_error is known.
  template <bool reads>
  INLINE void one_write(int64_t j, int64_t later, const T* alpha, const T* reader) {
    const T strength = rows.beta(j);
    Lanes<T> error[N], d_write[N];
    UNROLL for (int n = 0; n < N; ++n) error[n] = own[n] * columns.load(rows.error(j), n);
    const T* w[] = {rows.key(j), rows.erase(later), alpha, reader};
    T* const d_key = sums.d_key + rows.write(j) * job.k;
    T after = gamma;
    UNROLL for (int n = 0; n < N; ++n) d_error[n] *= 1 / gamma;
    if (reads && decays == Decays::matrix) after *= *alpha;
    if (reads && decays == Decays::matrix && !keeps(after)) {
      gamma = 1, w[2] = &after;
      sweep<reads, true>(G.M, job.k, w, d_error, d_read, error, d_write, strength, d_key, sums.first);
    } else {
      gamma = after;
      if (reads) UNROLL for (int n = 0; n < N; ++n) d_read[n] *= 1 / gamma;
      sweep<reads, reads && decays == Decays::rows>(G.M, job.k, w, d_error, d_read, error, d_write, strength * gamma, d_key, sums.first);
    }
    Lanes<T> d_beta = {};
    UNROLL for (int n = 0; n < N; ++n) {
      d_write[n] *= gamma;
      d_beta += d_write[n] * error[n];
      d_error[n] = strength * d_write[n];
      columns.store(job.d_value + rows.write(j) * job.v, n, d_error[n]);
      if (decays == Decays::matrix) product -= own[n] * d_error[n] * columns.load(rows.value(j), n);
    }
    T& sum = sums.d_beta[rows.write(j)];
    sum = (sums.first ? T(0) : sum) + sum_of<T>(d_beta);
  }

  // Its pass over G: du = Gᵀ k, and β G r. A separate function, so that nothing else occupies registers.
  template <bool reads, bool fades>
  OUTLINE static void sweep(Lanes<T>* M, int64_t k, const T* const* w, const Lanes<T>* d_error, const Lanes<T>* d_read,
                            const Lanes<T>* r, Lanes<T>* d_write, T strength, T* d_key, bool first) {
    const T *key = w[0], *erased = w[1], *alpha = w[2], *reader = w[3];
    Lanes<T> later[N], now[N], error[N], sum[N] = {}, alphas = {};
    UNROLL for (int n = 0; n < N; ++n) later[n] = d_error[n], now[n] = d_read[n], error[n] = r[n];
    if (fades && decays == Decays::matrix) alphas = broadcast(alpha);
    for (int64_t row = 0; row < k; row += L<T>) {
      const int64_t count = std::min<int64_t>(L<T>, k - row);
      Lanes<T> products[L<T>];
      for (int64_t i = count; i < L<T>; ++i) products[i] = Lanes<T>{};
      for (int64_t i = 0; i < count; ++i, M += N) {
        const Lanes<T> written = broadcast(key + row + i);
        Lanes<T> before, read, product = {};
        if (erases) before = broadcast(erased + row + i);
        if (reads) read = broadcast(reader + row + i);
        if (fades && decays == Decays::rows) alphas = broadcast(alpha + row + i);
        UNROLL for (int n = 0; n < N; ++n) {
          Lanes<T> m = M[n];
          if (erases) m -= later[n] * before;
          if (fades) m *= alphas;
          if (reads) m += now[n] * read;
          sum[n] += m * written;
          product += m * error[n];
          if (erases || reads) M[n] = m;
        }
        products[i] = product;
      }
      const Lanes<T> total = strength * sums_of<T>(products);
      store_until(d_key, row, k, first ? total : load_until(d_key, row, k) + total);
    }
    UNROLL for (int n = 0; n < N; ++n) d_write[n] = sum[n];
  }

  INLINE void fetch(int64_t i) {
    rows.fetch(i);
    prefetch(job.d_out + rows.query(i) * job.v, job.g * job.v);
    if (decays == Decays::matrix) prefetch(job.out + rows.query(i) * job.v, job.g * job.v);
    for (int64_t j = i * job.m; j < (i + 1) * job.m; ++j) {
      prefetch((erases ? job.errors : job.value) + rows.write(j) * job.v, job.v);
      if (erases && decays == Decays::matrix) prefetch(job.value + rows.write(j) * job.v, job.v);
      prefetch_to_write(job.d_value + rows.write(j) * job.v, job.v);
      prefetch_to_write(sums.d_key + rows.write(j) * job.k, job.k);
    }
  }
};

// Given dv, computes dq, da and, for a decay per row, d log α, by columns of the transpose of S.
template <class T, Decays decays, bool erases, int N>
struct BackwardRows {
  using Job = FastWeights<T, decays, erases>;
  static constexpr Step fade = Job::fade_transposed, look = Job::look;

  const Job& job;
  const typename Job::Rows rows;
  const Columns<T, N> columns;
  Slice<T, N> S;
  T gamma = 1;

  BackwardRows(const Job& job, int64_t head, int64_t slice)
      : job(job), rows(job, head), columns{job.k, slice}, S{columns, job.v, scratch<T>(job.v * N)} {
    S.read_transposed(job.state + head * job.k * job.v);
    Lanes<T> total[N] = {};  // P_t − P_{t+1} of a token
    for (int64_t i = 0, j = 0; i < job.t;) {
      const typename Job::Stretch now(rows, i, j);
      if (now.begins && rows.reset(i)) S.clear(), gamma = 1;
      if (now.begins) fetch(i + 2 + now.tokens), fetch(i + 3 + now.tokens);
      put(now, total);
      j += 1 + now.two;
      i += now.ends + now.tokens;
    }
    if (decays == Decays::rows) add_up(head);
  }

  // Four steps: the decay of token i, write j (prediction, then write), and a read.
  template <class Pass>
  INLINE void set_decay(Pass& pass, int step, int64_t i) {
    if (decays == Decays::nothing) return;
    UNROLL for (int n = 0; n < N; ++n)
      pass.x[step][n] = decays == Decays::matrix ? gamma * broadcast(rows.alpha(i)) : columns.load(rows.alpha(i), n);
    gamma = 1;
  }
  template <class Pass>
  INLINE void set_write(Pass& pass, int step, int64_t j, T scale = 1) {
    const T *key = rows.key(j), strength = scale * rows.beta(j);
    pass.w[step] = job.d_value + rows.write(j) * job.v, pass.w[step + 1] = rows.error(j);
    UNROLL for (int n = 0; n < N; ++n) pass.x[step + 1][n] = strength * columns.load(key, n);
  }
  template <class Pass>
  INLINE void set_read(Pass& pass, int step, int64_t query) {
    pass.w[step] = job.d_out + query * job.v;
  }

  // Results of those steps: −da, and dq / scale.
  INLINE void take_write(int64_t j, const Lanes<T>* got, Lanes<T>* total) {
    const int64_t row = rows.write(j) * job.k;
    UNROLL for (int n = 0; n < N; ++n) {
      if (decays == Decays::rows) {
        total[n] -= columns.load(rows.key(j), n) * columns.load(job.d_key + row, n);
        if (erases) total[n] -= columns.load(rows.erase(j), n) * got[n];
      }
      if (erases && job.d_erase) columns.store(job.d_erase + row, n, -got[n]);
      else if (erases) columns.add(job.d_key + row, n, -got[n]);
    }
  }
  INLINE void take_read(int64_t query, const Lanes<T>* got, Lanes<T>* total) {
    UNROLL for (int n = 0; n < N; ++n) {
      const Lanes<T> d_query = job.scale * got[n];
      columns.store(job.d_q + query * job.k, n, d_query);
      if (decays == Decays::rows) total[n] += columns.load(job.q + query * job.k, n) * d_query;
    }
  }
  INLINE void take_total(int64_t i, Lanes<T>* total) {
    UNROLL for (int n = 0; n < N; ++n) {
      if (decays == Decays::rows) columns.put(job.d_decay + rows.token(i) * job.k, n, total[n]);
      total[n] = Lanes<T>{};
    }
  }

  INLINE void put(const typename Job::Stretch& now, Lanes<T> (&total)[N]) {
    const int64_t i = now.i, j = now.j, query = rows.query(i), decays_for = now.begins ? i : job.t;
    Lanes<T> d_erase[2][N] = {}, d_query[2][N] = {};
    if (now.tokens && decays == Decays::matrix && keeps(gamma * *rows.alpha(i)) && keeps(gamma * *rows.alpha(i) * *rows.alpha(i + 1))) {
      const T first = gamma * *rows.alpha(i), second = gamma = first * *rows.alpha(i + 1);
      Pass<T, N, look, write, read, look, write, read> pass;
      set_write(pass, 0, j, 1 / first), set_read(pass, 2, query);
      set_write(pass, 3, j + 1, 1 / second), set_read(pass, 5, rows.query(i + 1));
      pass(S.M, job.v);
      UNROLL for (int n = 0; n < N; ++n) {
        d_query[0][n] = first * pass.x[2][n], d_query[1][n] = second * pass.x[5][n];
        if (erases) d_erase[0][n] = first * pass.x[0][n], d_erase[1][n] = second * pass.x[3][n];
      }
    } else if (now.tokens) {
      Pass<T, N, fade, look, write, read, fade, look, write, read> pass;
      set_decay(pass, 0, i), set_write(pass, 1, j), set_read(pass, 3, query);
      set_decay(pass, 4, i + 1), set_write(pass, 5, j + 1), set_read(pass, 7, rows.query(i + 1));
      pass(S.M, job.v);
      copy(d_query[0], pass.x[3]), copy(d_query[1], pass.x[7]);
      if (erases) copy(d_erase[0], pass.x[1]), copy(d_erase[1], pass.x[5]);
    } else if (now.two) {
      Pass<T, N, fade, look, write, look, write, read> pass;
      set_decay(pass, 0, decays_for), set_write(pass, 1, j), set_write(pass, 3, j + 1), set_read(pass, 5, query);
      pass(S.M, job.v);
      copy(d_query[0], pass.x[5]);
      if (erases) copy(d_erase[0], pass.x[1]), copy(d_erase[1], pass.x[3]);
    } else {
      Pass<T, N, fade, look, write, read> pass;
      set_decay(pass, 0, decays_for), set_write(pass, 1, j), set_read(pass, 3, query);
      pass(S.M, job.v);
      copy(d_query[0], pass.x[3]);
      if (erases) copy(d_erase[0], pass.x[1]);
    }
    take_write(j, d_erase[0], total);
    if (now.two && !now.tokens) take_write(j + 1, d_erase[1], total);
    if (!now.ends) return;
    take_read(query, d_query[0], total);
    for (int64_t other = query + 1; other < query + job.g; ++other) {
      Pass<T, N, read> pass;
      set_read(pass, 0, other);
      pass(S.M, job.v);
      take_read(other, pass.x[0], total);
    }
    take_total(i, total);
    if (!now.tokens) return;
    take_write(j + 1, d_erase[1], total), take_read(rows.query(i + 1), d_query[1], total), take_total(i + 1, total);
  }

  // d log α per row: the contributions of the tokens become sums over the token and all later ones of its segment.
  INLINE void add_up(int64_t head) {
    Lanes<T> sum[N] = {};
    for (int n = 0; n < N; ++n)
      for (int64_t lane = 0; lane < columns.lanes(); ++lane) {
        const int64_t row = (head * job.k + columns.at(n) + lane) * job.v;
        sum[n][lane] = dot(job.d_final + row, job.final_state + row, job.v);
      }
    for (int64_t i = job.t - 1; i >= 0; --i) {
      T* const d_decay = job.d_decay + rows.token(i) * job.k;
      const bool reset = rows.reset(i), decayed = rows.live(i) && !reset;
      UNROLL for (int n = 0; n < N; ++n) {
        sum[n] += columns.load(d_decay, n);
        columns.put(d_decay, n, decayed ? sum[n] : Lanes<T>{});
        if (reset) sum[n] = Lanes<T>{};
      }
    }
  }

  INLINE void fetch(int64_t i) {
    if (i >= job.t) return;
    rows.fetch(i);
    prefetch(job.d_out + rows.query(i) * job.v, job.g * job.v);
    prefetch_to_write(job.d_q + rows.query(i) * job.k, job.g * job.k);
    for (int64_t j = i * job.m; j < (i + 1) * job.m; ++j) {
      prefetch((erases ? job.errors : job.value) + rows.write(j) * job.v, job.v);
      prefetch(job.d_value + rows.write(j) * job.v, job.v);
      if (erases) prefetch_to_write((job.d_erase ? job.d_erase : job.d_key) + rows.write(j) * job.k, job.k);
    }
  }
};

// The slices of a head are one task, which continues with the rows while the head's tokens are in the cache; or as many
// tasks as needed to give every thread one, in which case each but the first has its own sums.
template <class T, Decays decays, bool erases>
void backward(int threads, const FastWeights<T, decays, erases>& job) {
  const int64_t heads = job.b * job.h, tokens = heads * job.t, writes = tokens * job.m;
  threads = threads_for(threads, (7 * job.m + 2 * job.g) * tokens * job.k * job.v);
  const Slicing cut = slicing<T>(job.k, job.v, heads, threads);
  const int64_t tasks = std::min<int64_t>(cut.count, (threads + heads - 1) / heads);
  const int64_t sums = writes * (job.k + 1) + (decays == Decays::matrix ? tokens : 0);
  std::vector<T> others((tasks - 1) * sums);
  const auto rows = [&](auto N, int64_t head, int64_t slice) { BackwardRows<T, decays, erases, N>(job, head, slice); };
  Pool::run(threads, heads * tasks, [&](int64_t i) {
    const int64_t head = i / tasks, task = i % tasks;
    T* mine = task ? others.data() + (task - 1) * sums : nullptr;
    Sums<T> add{job.d_key, job.d_beta, job.d_decay, true};
    if (task) add = {mine, mine + writes * job.k, mine + writes * (job.k + 1), true};
    for (int64_t slice = task; slice < cut.count; slice += tasks, add.first = false)
      with_vectors<T>(cut.vectors, [&](auto N) { BackwardColumns<T, decays, erases, N>(job, head, slice, add); });
    if (tasks == 1) for_slices<T>(1, 1, job.v, job.k, [&](auto N, int64_t, int64_t slice) { rows(N, head, slice); });
  });
  if (tasks == 1) return;
  for (int64_t task = 1; task < tasks; ++task) {
    const T* theirs = others.data() + (task - 1) * sums;
    for (int64_t i = 0; i < writes * job.k; ++i) job.d_key[i] += *theirs++;
    for (int64_t i = 0; i < writes; ++i) job.d_beta[i] += *theirs++;
    if (decays == Decays::matrix)
      for (int64_t i = 0; i < tokens; ++i) job.d_decay[i] += *theirs++;
  }
  for_slices<T>(threads, heads, job.v, job.k, rows);
}

template <class T>
void fast_weights_backward(int threads, const int64_t* size, double scale, void* const* x) {
  FastWeightsCall<T> call = {};
  const T *by_matrix, *by_row;
  T *d_by_matrix, *d_by_row;
  from(x, call.q, call.key, call.value, call.beta, by_matrix, by_row, call.erase, call.state, call.marks.resets,
       call.marks.live, call.errors, call.out, call.final_state, call.d_out, call.d_final, call.d_q, call.d_key,
       call.d_value, call.d_beta, d_by_matrix, d_by_row, call.d_erase, call.d_state);
  call.scale = T(scale), call.d_decay = d_by_row ? d_by_row : d_by_matrix;
  with_fast_weights(call, by_matrix, by_row, size, [&](const auto& job) { backward(threads, job); });
}
