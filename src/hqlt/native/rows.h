// Operations on each head's row of numbers, in one fused pass each.
//
//     φ          y = r · s,  s = x σ(x),  r = (Σ s² + ε)^−½       ds = r · dy − r³ (Σ s dy) · s     dx = σ(x) (1 + x (1 − σ(x))) · ds
//     rotary     (y₁, y₂) = (c x₁ − s x₂, c x₂ + s x₁)            the same with −s
//     RMSNorm    y = w · r · m,  r = (mean m² + ε)^−½            dm = r w dy − r³ mean(w dy m) · m     dw = Σ r m dy
//     mixer      m = b + γ (a − b),  γ = σ(gate)                 da = γ dm     db = (1 − γ) dm     dgate = γ (1 − γ) (a − b) dm
//
// A backward pass needs only the inputs. A task is a range of consecutive rows.

template <class T>
INLINE Lanes<T> sigmoid(Lanes<T> x) {
  const Lanes<T> small = exponential<T>(x > T(0) ? -x : x);
  return (x > T(0) ? Lanes<T>{} + T(1) : small) / (T(1) + small);
}

// work(first, last) for ranges of rows, distributed over the threads. It takes about `cost` multiply-adds per number.
template <class Work>
void for_rows(int threads, int64_t rows, int64_t width, int64_t cost, const Work& work) {
  const int64_t stretch = std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1));
  Pool::run(threads_for(threads, rows * width * cost), (rows + stretch - 1) / stretch, [&](int64_t task) {
    work(task * stretch, std::min((task + 1) * stretch, rows));
  });
}

template <class T>
void unit_silu_forward(int threads, const int64_t* n, double epsilon, void* const* tensors) {
  const T* x;
  T* y;
  from(tensors, x, y);
  const int64_t rows = n[0], width = n[1];
  for_rows(threads, rows, width, 20, [&](int64_t first, int64_t last) {
    for (int64_t row = first * width; row < last * width; row += width) {
      Lanes<T> squares = {};
      for (int64_t i = 0; i < width; i += L<T>) {
        const Lanes<T> at = load_until(x + row, i, width), s = at * sigmoid<T>(at);
        store_until(y + row, i, width, s);
        squares += s * s;
      }
      const T inverse = T(1) / std::sqrt(sum_of<T>(squares) + T(epsilon));
      for (int64_t i = 0; i < width; i += L<T>) store_until(y + row, i, width, inverse * load_until(y + row, i, width));
    }
  });
}

template <class T>
void unit_silu_backward(int threads, const int64_t* n, double epsilon, void* const* tensors) {
  const T *x, *d_y;
  T* d_x;
  from(tensors, x, d_y, d_x);
  const int64_t rows = n[0], width = n[1], vectors = (width + L<T> - 1) / L<T>;
  for_rows(threads, rows, width, 30, [&](int64_t first, int64_t last) {
    Lanes<T>* gates = scratch<T>(vectors);
    for (int64_t row = first * width; row < last * width; row += width) {
      Lanes<T> squares = {}, products = {};
      for (int64_t i = 0; i < vectors; ++i) {
        const Lanes<T> at = load_until(x + row, i * L<T>, width), s = at * (gates[i] = sigmoid<T>(at));
        squares += s * s;
        products += s * load_until(d_y + row, i * L<T>, width);
      }
      const T inverse = T(1) / std::sqrt(sum_of<T>(squares) + T(epsilon));
      const T along = inverse * inverse * sum_of<T>(products);
      for (int64_t i = 0; i < vectors; ++i) {
        const Lanes<T> at = load_until(x + row, i * L<T>, width), gate = gates[i];
        const Lanes<T> d_s = inverse * (load_until(d_y + row, i * L<T>, width) - along * at * gate);
        store_until(d_x + row, i * L<T>, width, gate * (T(1) + at * (T(1) - gate)) * d_s);
      }
    }
  });
}

// n: rows b, tokens l, heads h, head width. direction: 1 applies the rotary embedding, −1 its inverse.
template <class T>
void rotate_forward(int threads, const int64_t* n, double direction, void* const* tensors) {
  const T *x, *cos, *sin;
  T* y;
  from(tensors, x, cos, sin, y);
  const int64_t l = n[1], rows = n[0] * l, h = n[2], width = n[3], half = width / 2;
  for_rows(threads, rows, h * width, 3, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T *c = cos + row % l * half, *s = sin + row % l * half;
      for (int64_t head = row * h * width; head < (row + 1) * h * width; head += width)
        for (int64_t i = 0; i < half; i += L<T>) {
          const Lanes<T> x1 = load_until(x + head, i, half), x2 = load_until(x + head + half, i, half);
          const Lanes<T> ci = load_until(c, i, half), si = T(direction) * load_until(s, i, half);
          store_until(y + head, i, half, x1 * ci - x2 * si);
          store_until(y + head + half, i, half, x2 * ci + x1 * si);
        }
    }
  });
}

// RMSNorm of rows m: y = w · r · m. fill(row, i) returns vector i of the row of m that begins at number `row`.
template <class T, class Fill>
INLINE T inverse_norm(int64_t row, int64_t width, T epsilon, Lanes<T>* m, const Fill& fill) {
  Lanes<T> squares = {};
  for (int64_t i = 0; i * L<T> < width; ++i) {
    m[i] = fill(row, i);
    squares += m[i] * m[i];
  }
  return T(1) / std::sqrt(sum_of<T>(squares) / T(width) + epsilon);
}

template <class T, class Fill>
void norm_rows(int threads, const int64_t* n, double epsilon, const T* weight, T* y, const Fill& fill) {
  const int64_t rows = n[0], width = n[1], vectors = (width + L<T> - 1) / L<T>;
  for_rows(threads, rows, width, 20, [&](int64_t first, int64_t last) {
    Lanes<T>* m = scratch<T>(vectors);
    for (int64_t row = first * width; row < last * width; row += width) {
      const T inverse = inverse_norm(row, width, T(epsilon), m, fill);
      for (int64_t i = 0; i < vectors; ++i)
        store_until(y + row, i * L<T>, width, inverse * m[i] * load_until(weight, i * L<T>, width));
    }
  });
}

// dm = r w dy − r³ mean(w dy m) · m is passed to spread(row, i, dm); dw = Σ r m dy is added to d_weight.
template <class T, class Fill, class Spread>
void norm_rows_backward(int threads, const int64_t* n, double epsilon, const T* weight, const T* d_y, T* d_weight,
                        const Fill& fill, const Spread& spread) {
  const int64_t rows = n[0], width = n[1], vectors = (width + L<T> - 1) / L<T>;
  std::mutex summing;
  for_rows(threads, rows, width, 30, [&](int64_t first, int64_t last) {
    Lanes<T>*m = scratch<T>(2 * vectors), *d_weights = m + vectors;
    std::fill_n(d_weights, vectors, Lanes<T>{});
    for (int64_t row = first * width; row < last * width; row += width) {
      const T inverse = inverse_norm(row, width, T(epsilon), m, fill);
      Lanes<T> products = {};
      for (int64_t i = 0; i < vectors; ++i) {
        const Lanes<T> dy = load_until(d_y + row, i * L<T>, width);
        d_weights[i] += inverse * m[i] * dy;
        products += m[i] * dy * load_until(weight, i * L<T>, width);
      }
      const T along = inverse * inverse * sum_of<T>(products) / T(width);
      for (int64_t i = 0; i < vectors; ++i) {
        const Lanes<T> scaled = load_until(weight, i * L<T>, width) * load_until(d_y + row, i * L<T>, width);
        spread(row, i, inverse * (scaled - along * m[i]));
      }
    }
    std::lock_guard<std::mutex> lock(summing);
    for (int64_t i = 0; i < width; ++i) d_weight[i] += reinterpret_cast<const T*>(d_weights)[i];
  });
}

template <class T>
void rms_norm_forward(int threads, const int64_t* n, double epsilon, void* const* tensors) {
  const T *x, *weight;
  T* y;
  from(tensors, x, weight, y);
  norm_rows(threads, n, epsilon, weight, y, [=](int64_t row, int64_t i) { return load_until(x + row, i * L<T>, n[1]); });
}

// The caller fills d_weight with zeros, here and below.
template <class T>
void rms_norm_backward(int threads, const int64_t* n, double epsilon, void* const* tensors) {
  const T *x, *weight, *d_y;
  T *d_x, *d_weight;
  from(tensors, x, weight, d_y, d_x, d_weight);
  norm_rows_backward(
      threads, n, epsilon, weight, d_y, d_weight,
      [=](int64_t row, int64_t i) { return load_until(x + row, i * L<T>, n[1]); },
      [=](int64_t row, int64_t i, Lanes<T> dm) { store_until(d_x + row, i * L<T>, n[1], dm); });
}

template <class T>
void mix_forward(int threads, const int64_t* n, double epsilon, void* const* tensors) {
  const T *a, *b, *gate, *weight;
  T* y;
  from(tensors, a, b, gate, weight, y);
  norm_rows(threads, n, epsilon, weight, y, [=](int64_t row, int64_t i) {
    const auto at = [=](const T* x) { return load_until(x + row, i * L<T>, n[1]); };
    return at(b) + sigmoid<T>(at(gate)) * (at(a) - at(b));
  });
}

template <class T>
void mix_backward(int threads, const int64_t* n, double epsilon, void* const* tensors) {
  const T *a, *b, *gate, *weight, *d_y;
  T *d_a, *d_b, *d_gate, *d_weight;
  from(tensors, a, b, gate, weight, d_y, d_a, d_b, d_gate, d_weight);
  norm_rows_backward(
      threads, n, epsilon, weight, d_y, d_weight,
      [=](int64_t row, int64_t i) {
        const auto at = [=](const T* x) { return load_until(x + row, i * L<T>, n[1]); };
        return at(b) + sigmoid<T>(at(gate)) * (at(a) - at(b));
      },
      [=](int64_t row, int64_t i, Lanes<T> dm) {
        const auto at = [=](const T* x) { return load_until(x + row, i * L<T>, n[1]); };
        const auto put = [=](T* x, Lanes<T> y) { store_until(x + row, i * L<T>, n[1], y); };
        const Lanes<T> gamma = sigmoid<T>(at(gate));
        put(d_a, gamma * dm), put(d_b, (T(1) - gamma) * dm);
        put(d_gate, gamma * (T(1) - gamma) * (at(a) - at(b)) * dm);
      });
}
