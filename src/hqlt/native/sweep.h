// One pass over a slice of a matrix M, the heart of both write rules, forward and backward: a list of steps, each
//
//     write:  M ← M + w ⊗ x        or        read:  x = Mᵀ w
//
// done in this order to every row. The weights w of the rows are read from memory one number at a time; what lies along
// the columns, x, stays in registers. Each vector of M is loaded once, serves every step, and is stored once.

enum Step { write, read };

template <class T, int N, Step... steps>
struct Pass {
  static constexpr int count = sizeof...(steps);
  static constexpr Step kind[] = {steps...};
  const T* w[count];
  Lanes<T> x[count][N];

  INLINE void operator()(Lanes<T>* M, int64_t rows) {
    // Several rows at a time, where a row alone has too few sums to hide the latency of a multiply-add.
    constexpr int work = N * count, together = work >= 8 ? 1 : work >= 4 ? 2 : 4;
    Lanes<T> sums[together][count][N] = {};
    int64_t i = 0;
    for (; i + together <= rows; i += together)
      UNROLL for (int s = 0; s < together; ++s) row(M, i + s, sums[s]);
    for (; i < rows; ++i) row(M, i, sums[0]);
    UNROLL for (int step = 0; step < count; ++step)
      if (kind[step] == read)
        UNROLL for (int n = 0; n < N; ++n) {
          x[step][n] = sums[0][step][n];
          UNROLL for (int s = 1; s < together; ++s) x[step][n] += sums[s][step][n];
        }
  }

 private:
  INLINE void row(Lanes<T>* M, int64_t i, Lanes<T> (*sum)[N]) {
    constexpr bool writes = ((steps == write) || ...);
    Lanes<T> weight[count];
    UNROLL for (int step = 0; step < count; ++step) weight[step] = broadcast(w[step] + i);
    UNROLL for (int n = 0; n < N; ++n) {
      Lanes<T> m = M[i * N + n];
      UNROLL for (int step = 0; step < count; ++step)
        if (kind[step] == write) m += x[step][n] * weight[step];
        else sum[step][n] += m * weight[step];
      if (writes) M[i * N + n] = m;
    }
  }
};

// A slice of a [rows, columns] matrix in memory, or of the transpose of one, brought into scratch and back.
template <class T, int N>
struct Slice {
  Columns<T, N> columns;
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
