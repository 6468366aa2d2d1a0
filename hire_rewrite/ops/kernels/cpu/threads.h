// Work shared between the caller and the threads of XLA's pool.

#ifndef HIRE_REWRITE_THREADS_H_
#define HIRE_REWRITE_THREADS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace hire {

// Calls work(begin, end) for pieces of [0, count), at most `grain` long, on all threads.
//
// The caller takes pieces like every thread and then waits for those that others are at. Nobody
// waits for a thread that has not begun, so a busy pool delays nothing and cannot deadlock.
template <typename Pool, typename Work>
void Share(Pool& pool, int64_t count, int64_t grain, Work work) {
  struct State {
    State(Work work, int64_t count, int64_t grain)
        : work(std::move(work)), count(count), grain(grain) {}
    Work work;
    const int64_t count, grain;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};

    void Run() {
      for (;;) {
        const int64_t begin = next.fetch_add(grain);
        if (begin >= count) return;
        const int64_t end = begin + grain < count ? begin + grain : count;
        work(begin, end);
        done.fetch_add(end - begin, std::memory_order_release);
      }
    }
  };
  auto state = std::make_shared<State>(std::move(work), count, grain);
  const int64_t pieces = (count + grain - 1) / grain;
  const int64_t threads = pool.num_threads();
  for (int64_t i = 1; i < threads && i < pieces; ++i) {
    pool.Schedule([state] { state->Run(); });
  }
  state->Run();
  while (state->done.load(std::memory_order_acquire) < count) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace hire

#endif  // HIRE_REWRITE_THREADS_H_
