// Work shared between the caller and the threads of XLA's pool.

#ifndef HIRE_REWRITE_THREADS_H_
#define HIRE_REWRITE_THREADS_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <utility>

namespace hire {

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// The work of one call: pieces of [0, count), which threads take until none is left. It lives until
// all that hold it have released it.
class Job {
 public:
  Job(int64_t count, int64_t grain, int64_t threads) : count_(count), grain_(grain), threads_(threads) {}
  virtual ~Job() = default;

  void Hold() { holders_.fetch_add(1, std::memory_order_relaxed); }
  void Release() {
    if (holders_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  void Run() {
    for (int64_t begin = next_.load(std::memory_order_relaxed);;) {
      int64_t end;
      do {
        if (begin >= count_) return;
        const int64_t grains = (count_ - begin) / (2 * threads_ * grain_);
        end = std::min(count_, begin + std::max<int64_t>(1, grains) * grain_);
      } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
      Work(begin, end);
      done_.fetch_add(end - begin, std::memory_order_release);
      begin = end;
    }
  }

  void Wait() const {
    while (done_.load(std::memory_order_acquire) < count_) Pause();
  }

 protected:
  virtual void Work(int64_t begin, int64_t end) = 0;

 private:
  const int64_t count_, grain_, threads_;
  std::atomic<int64_t> next_{0}, done_{0}, holders_{1};
};

// Threads that have ended their part of a job and look out for the next one for a while, one at each
// desk: to schedule one anew takes a tenth of a small product's time.
class Desks {
 public:
  // Gives a job to threads that wait, at most so many; returns how many.
  static int64_t Give(Job* job, int64_t most) {
    int64_t given = 0;
    for (std::atomic<Job*>& desk : desks_) {
      if (given == most) break;
      Job* free = Waiting();
      if (desk.load(std::memory_order_relaxed) != free) continue;
      job->Hold();
      if (desk.compare_exchange_strong(free, job, std::memory_order_acq_rel)) {
        ++given;
      } else {
        job->Release();
      }
    }
    return given;
  }

  // Runs and releases a job, and those that are given next.
  static void Serve(Job* job) {
    for (;;) {
      job->Run();
      job->Release();
      std::atomic<Job*>* desk = Take();
      if (desk == nullptr) return;
      const auto end = std::chrono::steady_clock::now() + kPatience;
      do {
        for (int i = 0; i < 16 && desk->load(std::memory_order_relaxed) == Waiting(); ++i) Pause();
      } while (desk->load(std::memory_order_relaxed) == Waiting() &&
               std::chrono::steady_clock::now() < end);
      job = desk->exchange(nullptr, std::memory_order_acq_rel);
      if (job == Waiting()) return;
    }
  }

 private:
  // About as long as a decode step's other work between two products; the pool's may have to wait for
  // it.
  static constexpr std::chrono::microseconds kPatience{60};

  static Job* Waiting() { return reinterpret_cast<Job*>(desks_); }  // no job lies there

  static std::atomic<Job*>* Take() {
    for (std::atomic<Job*>& desk : desks_) {
      Job* nobody = nullptr;
      if (desk.compare_exchange_strong(nobody, Waiting(), std::memory_order_acq_rel)) return &desk;
    }
    return nullptr;
  }

  static inline std::atomic<Job*> desks_[64] = {};
};

// Calls work(begin, end) for pieces of [0, count) on all threads. Pieces are multiples of `grain` but
// for the last one; the first are long and the last are short, so that threads end together.
//
// The caller takes pieces like every thread and then waits for those that others are at. Nobody
// waits for a thread that has not begun, so a busy pool delays nothing and cannot deadlock.
template <typename Pool, typename Task>
void Share(Pool& pool, int64_t count, int64_t grain, Task task) {
  class Own : public Job {
   public:
    Own(Task task, int64_t count, int64_t grain, int64_t threads)
        : Job(count, grain, threads), task_(std::move(task)) {}

   protected:
    void Work(int64_t begin, int64_t end) override { task_(begin, end); }

   private:
    Task task_;
  };
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t helpers = std::min(threads - 1, (count + grain - 1) / grain - 1);
  if (helpers <= 0) {
    if (count > 0) task(int64_t{0}, count);
    return;
  }
  Job* job = new Own(std::move(task), count, grain, threads);
  for (int64_t i = Desks::Give(job, helpers); i < helpers; ++i) {
    job->Hold();
    pool.Schedule([job] { Desks::Serve(job); });
  }
  job->Run();
  job->Wait();
  job->Release();
}

}  // namespace hire

#endif  // HIRE_REWRITE_THREADS_H_
