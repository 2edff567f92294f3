// One pass over a slice of a matrix M, the core of all write rules, forward and backward. A pass is a list of steps
//
//     write:  M ← M + w ⊗ x        read:  x = Mᵀ w        fade_rows:  M ← Diag(w) M        fade_columns:  M ← M Diag(x)
//
// applied in this order to every row. The row weights w are read from memory one number at a time; the column vectors x
// stay in registers. Each vector of M is loaded once, used by every step, and stored once. A step that a rule does not
// have is `skip`. With `ends_half`, only the lower half of the last vector of a row is processed.

enum Step { skip, write, read, fade_rows, fade_columns };

template <class T, int N, bool ends_half, Step... steps>
struct Sweep {
  static constexpr int count = sizeof...(steps);
  static constexpr Step kind[] = {steps...};
  const T* w[count];
  Lanes<T> x[count][N];

  INLINE void operator()(Lanes<T>* M, int64_t rows) {
    // Several rows at a time, if a single row has too few sums to hide the latency of a multiply-add.
    constexpr int work = N * ((steps != skip) + ... + 0), together = work >= 8 ? 1 : work >= 4 ? 2 : 4;
    Sums sums[together] = {};
    int64_t i = 0;
    for (; i + together <= rows; i += together)
      UNROLL for (int s = 0; s < together; ++s) row(M, i + s, sums[s]);
    for (; i < rows; ++i) row(M, i, sums[0]);
    UNROLL for (int step = 0; step < count; ++step)
      if (kind[step] == read)
        UNROLL for (int n = 0; n < N; ++n) {
          x[step][n] = sums[0].of(step, n);
          UNROLL for (int s = 1; s < together; ++s) x[step][n] += sums[s].of(step, n);
        }
  }

 private:
  static constexpr int whole = N - ends_half;
  struct Sums {
    Lanes<T> wide[count][whole + !whole];
    HalfLanes<T> half[count];

    INLINE Lanes<T> of(int step, int n) const {
      if (n < whole) return wide[step][n];
      Lanes<T> x = {};
      __builtin_memcpy(&x, &half[step], sizeof half[step]);
      return x;
    }
  };

  INLINE void row(Lanes<T>* M, int64_t i, Sums& sums) {
    Lanes<T> weight[count];
    UNROLL for (int step = 0; step < count; ++step)
      if (kind[step] != skip && kind[step] != fade_columns) weight[step] = broadcast(w[step] + i);
    UNROLL for (int n = 0; n < whole; ++n) entry<Lanes<T>>(M[i * N + n], n, weight, [&](int step) -> auto& { return sums.wide[step][n]; });
    if constexpr (ends_half) entry<HalfLanes<T>>(M[i * N + whole], whole, weight, [&](int step) -> auto& { return sums.half[step]; });
  }
  template <class V, class Sum>
  INLINE void entry(Lanes<T>& at, int n, const Lanes<T>* weight, const Sum& sum) {
    constexpr bool writes = ((steps != skip && steps != read) || ...);
    V m;
    __builtin_memcpy(&m, &at, sizeof m);
    UNROLL for (int step = 0; step < count; ++step)
      if (kind[step] == write) m += as<T, V>(x[step][n]) * as<T, V>(weight[step]);
      else if (kind[step] == read) sum(step) += m * as<T, V>(weight[step]);
      else if (kind[step] == fade_rows) m *= as<T, V>(weight[step]);
      else if (kind[step] == fade_columns) m *= as<T, V>(x[step][n]);
    if (writes) __builtin_memcpy(&at, &m, sizeof m);
  }
};
template <class T, int N, Step... steps>
using Pass = Sweep<T, N, false, steps...>;

// Copies a slice of a [rows, columns] matrix in memory, or of its transpose, to scratch memory and back.
template <class T, int N, bool ends_half = false>
struct Slice {
  Columns<T, N, ends_half> columns;
  int64_t rows;
  Lanes<T>* M;

  void clear() {
    for (int64_t i = 0; i < rows * N; ++i) M[i] = Lanes<T>{};
  }
  void read(const T* from) {
    for (int64_t i = 0; i < rows; ++i)
      for (int n = 0; n < N; ++n) M[i * N + n] = columns.load(from + i * columns.width, n);
  }
  void read_transposed(const T* from) {
    clear();
    for (int n = 0; n < N; ++n)
      for (int64_t lane = 0; lane < columns.lanes(); ++lane)
        for (int64_t i = 0; i < rows; ++i) M[i * N + n][lane] = from[(columns.at(n) + lane) * rows + i];
  }
  void write(T* to) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int n = 0; n < N; ++n) columns.store(to + i * columns.width, n, M[i * N + n]);
  }
};
