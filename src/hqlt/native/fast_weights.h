// Fast weights with any write rule of one family: decay, then m writes, then the read.
//
//     S ← Diag(α_t) S      m times: r = v − Sᵀ a, S ← S + k ⊗ β r      out_t = scale · Sᵀ q_t
//
// α is 1, one number per matrix or one per row; a is k, another key, or 0 (then r = v). The columns of S are independent,
// so each slice of columns is a task: it stays in the L1 cache. One pass over it writes and reads a token (or two), decays
// for the next and predicts its writes. The errors r are saved for the backward pass.
//
// If one number decays the matrix, S is represented as γ times the stored matrix: a decay only multiplies γ, and γ scales
// what is written and read, until it becomes small (`keeps`) and is multiplied into the stored matrix.
//
// A token that is not live decays by 1 and writes zeros. If g > 1 queries read a matrix, it is written token by token, and
// all queries but the first take an additional pass.

enum class Decays { nothing, matrix, rows };

// Whether γ can stay separate from the matrix, without loss of precision or overflow.
template <class T>
INLINE bool keeps(T gamma) {
  return gamma >= T(1) / 1024 && gamma <= T(1024);
}

template <class T>
struct FastWeightsCall {
  int64_t b, t, h, k, v, g, m;
  T scale;
  const T *zeros, *ones;  // as many as the larger of k and v
  const T *q, *key, *value, *beta, *alpha, *erase, *state;
  Marks marks;
  T *errors, *out, *final_state;
  const T *d_out, *d_final;
  T *d_q, *d_key, *d_value, *d_beta, *d_decay, *d_erase, *d_state;  // d_erase: null if a is k
};

template <class T, Decays decays, bool erases>
struct FastWeights : FastWeightsCall<T> {
  static constexpr Step look = erases ? read : skip;
  static constexpr Step fade = decays == Decays::nothing ? skip : decays == Decays::matrix ? fade_columns : fade_rows;
  static constexpr Step fade_transposed = decays == Decays::nothing ? skip : fade_columns;

  // The rows of one head, of its tokens i and of their writes j = m·i, …
  struct Rows : Head {
    const FastWeights& job;
    const int64_t first_write;

    Rows(const FastWeights& job, int64_t head)
        : Head(head, job.t, job.h, job.g, job.marks), job(job), first_write(head / job.h * job.t * job.m * job.h + head % job.h) {}
    INLINE int64_t write(int64_t j) const { return first_write + j * this->stride; }
    INLINE bool written(int64_t j) const { return !this->marks.live || this->marks.live[job.m == 1 ? j : j / job.m]; }
    INLINE const T* key(int64_t j) const { return written(j) ? job.key + write(j) * job.k : job.zeros; }
    INLINE const T* erase(int64_t j) const { return !erases || !written(j) ? job.zeros : job.erase + write(j) * job.k; }
    INLINE const T* value(int64_t j) const { return written(j) ? job.value + write(j) * job.v : job.zeros; }
    INLINE const T* error(int64_t j) const { return erases ? job.errors + write(j) * job.v : value(j); }
    INLINE T beta(int64_t j) const { return written(j) ? job.beta[write(j)] : T(0); }
    INLINE const T* alpha(int64_t i) const {  // k numbers, or one
      if (decays == Decays::nothing || i >= this->t || !this->live(i)) return job.ones;
      return job.alpha + this->token(i) * (decays == Decays::rows ? job.k : 1);
    }
    // The step of a pass that decays by the α of token i.
    template <class Pass>
    INLINE void decay(Pass& pass, int step, int64_t i) const {
      if (decays == Decays::rows) pass.w[step] = alpha(i);
      if (decays == Decays::matrix)
        for (auto& x : pass.x[step]) x = broadcast(alpha(i));
    }
    INLINE void fetch(int64_t i) const {
      const int64_t token = this->token(i), query = this->query(i);
      prefetch(job.q + query * job.k, this->g * job.k);
      if (decays == Decays::rows) prefetch(job.alpha + token * job.k, job.k);
      for (int64_t j = i * job.m; j < (i + 1) * job.m; ++j) {
        prefetch(job.key + write(j) * job.k, job.k);
        if (erases && job.erase != job.key) prefetch(job.erase + write(j) * job.k, job.k);
      }
    }
  };

  // The writes of one pass over S, from token i and its write j on: one of each of two tokens, two of one, or one.
  struct Stretch {
    const int64_t i, j;
    const bool tokens, two, begins, ends;

    INLINE Stretch(const Rows& rows, int64_t i, int64_t j)
        : i(i), j(j), tokens(rows.job.m == 1 && rows.g == 1 && i + 1 < rows.t && !rows.reset(i + 1)),
          two(tokens || j + 1 < (i + 1) * rows.job.m), begins(j == i * rows.job.m), ends(tokens || j + 1 + two == (i + 1) * rows.job.m) {}
  };

  template <int N, bool ends_half>
  struct Forward {
    template <Step... steps>
    using Pass = Sweep<T, N, ends_half, steps...>;

    const FastWeights& job;
    const Rows rows;
    const Columns<T, N, ends_half> columns;
    Slice<T, N, ends_half> S;
    T* faded;             // room for a product α ⊙ a
    T gamma = 1;
    const T* ahead[2];    // row weights of the predictions of the next two writes
    Lanes<T> seen[2][N];  // their predictions, before either is written

    Forward(const FastWeights& job, int64_t head, int64_t slice)
        : job(job), rows(job, head), columns{job.v, slice},
          S{columns, job.k, scratch<T>(job.k * N + (job.k + L<T> - 1) / L<T>)}, faded(reinterpret_cast<T*>(S.M + job.k * N)) {
      S.read(job.state + head * job.k * job.v);
      look_ahead(0);
      read_and_close(rows.query(0), 0);
      for (int64_t i = 0, j = 0; i < job.t;) {
        const Stretch now(rows, i, j);
        if (now.begins && rows.reset(i)) {
          S.clear(), gamma = 1;
          UNROLL for (int n = 0; n < N; ++n) seen[0][n] = seen[1][n] = Lanes<T>{};
        }
        if (now.begins) fetch(i + 3 + now.tokens), fetch(i + 4 + now.tokens);
        put(now);
        j += 1 + now.two;
        i += now.ends + now.tokens;
      }
      if (decays == Decays::matrix && gamma != 1) {
        Pass<fade_columns> pass;
        UNROLL for (int n = 0; n < N; ++n) pass.x[0][n] = Lanes<T>{} + gamma;
        pass(S.M, job.k);
      }
      S.write(job.final_state + head * job.k * job.v);
    }

    // The second of two tokens with one write each decays before its prediction: with α ⊙ a, or α times the read of a.
    INLINE void look_ahead(int64_t j) {
      const int64_t last = job.t * job.m - 1;
      ahead[0] = rows.erase(std::min(j, last)), ahead[1] = rows.erase(std::min(j + 1, last));
      if (!erases || decays != Decays::rows || job.m > 1) return;
      const T* alpha = rows.alpha(std::min(j + 1, last));
      for (int64_t i = 0; i < job.k; i += L<T>)
        store_until(faded, i, job.k, load_until(alpha, i, job.k) * load_until(ahead[1], i, job.k));
      ahead[1] = faded;
    }

    // Runs a pass whose last two steps, from `step` on, look ahead; or whose last three do, decaying for token i first.
    template <class AnyPass>
    INLINE void run(AnyPass& pass, int step) {
      pass.w[step] = ahead[0], pass.w[step + 1] = ahead[1];
      pass(S.M, job.k);
      if (AnyPass::kind[step] == read)
        UNROLL for (int n = 0; n < N; ++n) seen[0][n] = gamma * pass.x[step][n], seen[1][n] = gamma * pass.x[step + 1][n];
    }
    template <class AnyPass>
    INLINE void close(AnyPass& pass, int step, int64_t i) {
      rows.decay(pass, step, i);
      if (decays == Decays::matrix) {
        UNROLL for (int n = 0; n < N; ++n) pass.x[step][n] *= gamma;
        gamma = 1;
      }
      run(pass, step + 1);
    }

    // β r; r is saved.
    INLINE void correct(int64_t j, const Lanes<T>* predicted, Lanes<T>* correction) {
      const T *wanted = rows.value(j), strength = rows.beta(j);
      UNROLL for (int n = 0; n < N; ++n) {
        Lanes<T> error = columns.load(wanted, n);
        if (erases) error -= predicted[n];
        if (erases && job.errors) columns.store(job.errors + rows.write(j) * job.v, n, error);
        correction[n] = strength * error;
      }
    }
    INLINE void store(int64_t query, const Lanes<T>* read) {
      UNROLL for (int n = 0; n < N; ++n) columns.store(job.out + query * job.v, n, job.scale * read[n]);
    }

    // One pass. Two writes were both predicted before either is written; the second is corrected by the first's write. If
    // the token continues after the pass, nothing decays, and its read is repeated later.
    INLINE void put(const Stretch& now) {
      const int64_t i = now.i, j = now.j, query = rows.query(i);
      const T *const key = rows.key(j), *const second_key = rows.key(j + now.two);
      Lanes<T> correction[2][N] = {}, got[2][N] = {};
      correct(j, seen[0], correction[0]);
      if (now.two) {
        if (erases) {
          const T overlap = dot(key, ahead[1], job.k);
          const T alpha = decays == Decays::matrix && now.tokens ? *rows.alpha(i + 1) : T(1);
          UNROLL for (int n = 0; n < N; ++n) {
            seen[1][n] += overlap * correction[0][n];
            if (decays == Decays::matrix) seen[1][n] *= alpha;
          }
        }
        correct(j + 1, seen[1], correction[1]);
      }
      look_ahead(j + 1 + now.two);
      const int64_t decays_for = now.ends && job.g == 1 ? i + 1 : job.t;
      if (now.tokens) {
        two_tokens(now, correction, got);
      } else if (now.two) {
        Pass<write, write, read, fade, look, look> pass;
        pass.w[0] = key, pass.w[1] = second_key, pass.w[2] = job.q + query * job.k;
        copy(pass.x[0], correction[0]), copy(pass.x[1], correction[1]);
        close(pass, 3, decays_for);
        copy(got[0], pass.x[2]);
      } else {
        Pass<write, read, fade, look, look> pass;
        const T before = gamma;
        write_and_read(pass, 0, i, j, before, correction[0]);
        close(pass, 2, decays_for);
        take(pass, 0, before, got[0]);
      }
      store(query, got[0]);
      if (now.tokens) store(rows.query(i + 1), got[1]);
      if (now.ends && job.g > 1) read_others(i);
    }

    // Two tokens of one write each, written and read one after the other. If γ takes their decays, S is not decayed.
    INLINE void two_tokens(const Stretch& now, const Lanes<T> (&correction)[2][N], Lanes<T> (&got)[2][N]) {
      if constexpr (decays == Decays::matrix) {
        const T second = gamma * *rows.alpha(now.i + 1), third = second * *rows.alpha(now.i + 2);
        if (keeps(second) && keeps(third)) {
          Pass<write, read, write, read, look, look> pass;
          write_and_read(pass, 0, now.i, now.j, gamma, correction[0]), write_and_read(pass, 2, now.i + 1, now.j + 1, second, correction[1]);
          const T first = std::exchange(gamma, third);
          run(pass, 4);
          return take(pass, 0, first, got[0]), take(pass, 2, second, got[1]);
        }
      }
      Pass<write, read, fade, write, read, fade, look, look> pass;
      const T before = gamma;
      write_and_read(pass, 0, now.i, now.j, before, correction[0]), write_and_read(pass, 3, now.i + 1, now.j + 1, before, correction[1]);
      rows.decay(pass, 2, now.i + 1);
      close(pass, 5, now.i + 2);
      take(pass, 0, before, got[0]), take(pass, 3, before, got[1]);
    }
    // The steps that write and read if S is γ times the stored matrix, and the result of the read.
    template <class AnyPass>
    INLINE void write_and_read(AnyPass& pass, int step, int64_t i, int64_t j, T gamma, const Lanes<T>* correction) {
      pass.w[step] = rows.key(j), pass.w[step + 1] = job.q + rows.query(i) * job.k;
      UNROLL for (int n = 0; n < N; ++n) pass.x[step][n] = (1 / gamma) * correction[n];
    }
    template <class AnyPass>
    INLINE void take(const AnyPass& pass, int step, T gamma, Lanes<T>* got) {
      UNROLL for (int n = 0; n < N; ++n) got[n] = gamma * pass.x[step + 1][n];
    }

    INLINE void read_others(int64_t i) {
      const int64_t last = rows.query(i) + job.g - 1;
      for (int64_t query = rows.query(i) + 1; query < last + (decays == Decays::nothing); ++query) {
        Pass<read> pass;
        pass.w[0] = job.q + query * job.k;
        pass(S.M, job.k);
        store(query, pass.x[0]);
      }
      if (decays != Decays::nothing) store(last, read_and_close(last, i + 1).x[0]);
    }
    INLINE Pass<read, fade, look, look> read_and_close(int64_t query, int64_t i) {
      Pass<read, fade, look, look> pass;
      pass.w[0] = job.q + query * job.k;
      close(pass, 1, i);
      return pass;
    }

    INLINE void fetch(int64_t i) {
      if (i >= job.t) return;
      rows.fetch(i);
      prefetch_to_write(job.out + rows.query(i) * job.v, job.g * job.v);
      for (int64_t j = i * job.m; j < (i + 1) * job.m; ++j) {
        prefetch(job.value + rows.write(j) * job.v, job.v);
        if (erases && job.errors) prefetch_to_write(job.errors + rows.write(j) * job.v, job.v);
      }
    }
  };

  template <int N, bool ends_half>
  void forward(int64_t head, int64_t slice) const {
    Forward<N, ends_half>(*this, head, slice);
  }
};

// Calls work(job) for the sizes of a call and the kind given by its tensors: one α per matrix, one per row, or none, and
// whether there is a key to erase.
template <class T, class Work>
void with_fast_weights(FastWeightsCall<T>& call, const T* by_matrix, const T* by_row, const int64_t* size, const Work& work) {
  call.b = size[0], call.t = size[1], call.m = size[2] / size[1], call.h = size[4], call.k = size[5], call.v = size[6];
  call.g = size[3] / call.h, call.alpha = by_row ? by_row : by_matrix;
  const int64_t width = std::max(call.k, call.v);
  const std::vector<T> zeros(call.marks.live ? width : 0), ones(by_row || by_matrix ? width : 0, T(1));
  call.zeros = zeros.data(), call.ones = ones.data();
  const auto with_decay = [&](auto erases) {
    if (by_row) work(FastWeights<T, Decays::rows, erases>{call});
    else if (by_matrix) work(FastWeights<T, Decays::matrix, erases>{call});
    else if constexpr (erases) work(FastWeights<T, Decays::nothing, true>{call});
    else throw std::invalid_argument("a decay, or a key to erase");
  };
  call.erase ? with_decay(std::true_type()) : with_decay(std::false_type());
}

template <class T>
void fast_weights_forward(int threads, const int64_t* size, double scale, void* const* x) {
  FastWeightsCall<T> call = {};
  const T *by_matrix, *by_row;
  from(x, call.q, call.key, call.value, call.beta, by_matrix, by_row, call.erase, call.state, call.marks.resets,
       call.marks.live, call.out, call.final_state, call.errors);
  call.scale = T(scale);
  with_fast_weights(call, by_matrix, by_row, size, [&](const auto& job) {
    const int64_t work = (2 * job.m + job.g) * job.b * job.t * job.h * job.k * job.v;
    for_slices_and_half<T>(threads_for(threads, work), job.b * job.h, job.k, job.v, [&](auto N, int64_t head, int64_t slice) {
      job.template forward<N, N.ends_half>(head, slice);
    });
  });
}
