// Threads for the tasks of a call. The calling thread also works, and `threads` includes it.
//
// If PyTorch runs on OpenMP, its own threads are used: they spin for a while after each of its operations, so that they
// start at once, whereas other threads would find no free core. They belong to the library that PyTorch has loaded:
// `openmp` is its GOMP_parallel, which Python looks up and passes. Otherwise, and in a forked child, in which OpenMP's
// threads no longer exist, a small pool of our own runs, which sleeps between calls. A caller that finds it busy (a
// second Python thread) works alone.
#pragma once
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>

class Pool {
 public:
  using Parallel = void(void (*work)(void*), void* data, unsigned threads, unsigned flags);
  static inline std::atomic<Parallel*> openmp{nullptr};

  // Runs work(0), …, work(tasks − 1), each once, in any order, and returns when all are done.
  template <class Work>
  static void run(int threads, int64_t tasks, const Work& work) {
    if (threads > tasks) threads = int(tasks);
    Parallel* const parallel = openmp;
    if (threads > 1 && parallel) {
      struct Share {
        const Work& work;
        int64_t tasks;
        std::atomic<bool> failed{false};
        std::atomic<int64_t> next{0};
      } share{work, tasks};
      parallel([](void* data) {
        Share& mine = *static_cast<Share*>(data);
        for (int64_t task; (task = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.tasks;)
          attempt(mine.work, task, mine.failed);
      }, &share, unsigned(threads), 0);
      if (share.failed) throw std::bad_alloc();
      return;
    }
    Pool* pool = threads > 1 ? &current() : nullptr;
    if (!pool || !pool->callers.try_lock()) {
      for (int64_t task = 0; task < tasks; ++task) work(task);
      return;
    }
    const std::lock_guard<std::mutex> calling(pool->callers, std::adopt_lock);
    struct Share {
      const Work& work;
      std::atomic<bool> failed{false};
    } share{work};
    pool->share(threads - 1, tasks, [](void* data, int64_t task) {
      Share& mine = *static_cast<Share*>(data);
      attempt(mine.work, task, mine.failed);
    }, &share);
    if (share.failed) throw std::bad_alloc();
  }

 private:
  // An exception must not leave the thread in which it was thrown; the caller rethrows it.
  template <class Work>
  static void attempt(const Work& work, int64_t task, std::atomic<bool>& failed) {
    try {
      if (!failed) work(task);
    } catch (...) {
      failed = true;
    }
  }

  std::mutex callers;  // one job at a time
  std::mutex gate;     // guards everything below except `next`
  std::condition_variable job_is_open, helper_is_done;
  int helpers_alive = 0, helpers_wanted = 0, helpers_working = 0;
  std::atomic<int64_t> next{0};
  int64_t tasks = 0;
  void (*call)(void*, int64_t) = nullptr;
  void* work = nullptr;

  static inline std::atomic<Pool*> pool{nullptr};

  // Threads do not survive a fork, and a lock may have been held: the child forgets all pools, and creates a new one.
  static inline const int watched = pthread_atfork(nullptr, nullptr, [] { pool = nullptr, openmp = nullptr; });

  static Pool& current() {
    static std::mutex birth;
    Pool* found = pool.load(std::memory_order_acquire);
    if (found) return *found;
    std::lock_guard<std::mutex> lock(birth);
    if (!pool.load()) pool.store(new Pool);  // never deleted; its threads sleep until the process ends
    return *pool.load();
  }

  void take_tasks() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) call(work, task);
  }

  void share(int helpers, int64_t n, void (*f)(void*, int64_t), void* w) {
    {
      std::lock_guard<std::mutex> lock(gate);
      for (; helpers_alive < helpers; ++helpers_alive) std::thread(&Pool::help, this).detach();
      tasks = n, call = f, work = w, next = 0, helpers_wanted = helpers;
    }
    helpers == 1 ? job_is_open.notify_one() : job_is_open.notify_all();
    take_tasks();
    std::unique_lock<std::mutex> lock(gate);
    helpers_wanted = 0;  // no work is left for helpers that have not woken up yet
    helper_is_done.wait(lock, [this] { return helpers_working == 0; });
  }

  void help() {
    std::unique_lock<std::mutex> lock(gate);
    for (;;) {
      job_is_open.wait(lock, [this] { return helpers_wanted > 0; });
      --helpers_wanted, ++helpers_working;
      lock.unlock();
      take_tasks();
      lock.lock();
      if (--helpers_working == 0) helper_is_done.notify_one();
    }
  }
};
