// A call of a target as XLA makes it, on arrays that end where their memory ends.

#ifndef HIRE_REWRITE_FRAME_H_
#define HIRE_REWRITE_FRAME_H_

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace fuzz {

// An array of a target. It begins `shift` bytes behind an allocation's start and ends at its end.
class Array {
 public:
  Array(XLA_FFI_DataType type, size_t item, std::vector<int64_t> dims, size_t shift = 0)
      : type_(type), dims_(std::move(dims)), count_(1) {
    for (int64_t dim : dims_) count_ *= dim;
    room_.reset(static_cast<char*>(std::malloc(count_ * item + shift)));
    data_ = room_.get() + shift;
    std::memset(data_, 0x5a, count_ * item);  // what a target does not write is seen
  }
  int64_t count() const { return count_; }
  int64_t dim(size_t i) const { return dims_[i]; }
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  XLA_FFI_Buffer Buffer() {
    return {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, type_, data_, static_cast<int64_t>(dims_.size()), dims_.data()};
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  XLA_FFI_DataType type_;
  std::vector<int64_t> dims_;
  int64_t count_;
  std::unique_ptr<char, Free> room_;
  char* data_;
};

// Threads that run what is scheduled, perhaps after the call has ended.
class Pool {
 public:
  static Pool& Get() {
    static Pool* pool = new Pool;  // never destroyed, as XLA's
    return *pool;
  }
  void Schedule(XLA_FFI_Task* task, void* data) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back([task, data] { task(data); });
    }
    some_.notify_one();
  }
  // Waits until nothing is left to do.
  void Rest() {
    std::unique_lock<std::mutex> lock(mutex_);
    none_.wait(lock, [this] { return tasks_.empty() && busy_ == 0; });
  }

 private:
  Pool() {
    for (int i = 0; i < 4; ++i) std::thread([this] { Work(); }).detach();
  }
  void Work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        some_.wait(lock, [this] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
        ++busy_;
      }
      task();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0 && tasks_.empty()) none_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable some_, none_;
  std::deque<std::function<void()>> tasks_;
  int busy_ = 0;
};

struct Context {
  int64_t threads;
};

inline const XLA_FFI_Api* Api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api api = {};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      return reinterpret_cast<XLA_FFI_Error*>(new std::string(args->message));
    };
    api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
      args->message = reinterpret_cast<std::string*>(args->error)->c_str();
    };
    api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) {
      delete reinterpret_cast<std::string*>(args->error);
    };
    api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      Pool::Get().Schedule(args->task, args->data);
      return nullptr;
    };
    api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      *args->num_threads = reinterpret_cast<Context*>(args->ctx)->threads;
      return nullptr;
    };
    return api;
  }();
  return &api;
}

// Calls a target; returns its error, empty for none.
inline std::string Call(XLA_FFI_Handler* target, int64_t threads, const std::vector<Array*>& operands,
                        const std::vector<Array*>& results, const int64_t* input_block = nullptr) {
  std::vector<XLA_FFI_Buffer> buffers;
  for (Array* array : operands) buffers.push_back(array->Buffer());
  for (Array* array : results) buffers.push_back(array->Buffer());
  std::vector<void*> pointers;
  for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  std::vector<XLA_FFI_ArgType> args(operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> rets(results.size(), XLA_FFI_RetType_BUFFER);
  XLA_FFI_ByteSpan name = {"input_block", 11}, *names = &name;
  XLA_FFI_AttrType kind = XLA_FFI_AttrType_SCALAR;
  int64_t number = input_block ? *input_block : 0;
  XLA_FFI_Scalar scalar = {XLA_FFI_DataType_S64, &number};
  void* attr = &scalar;
  Context context = {threads};
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = Api();
  frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&context);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), args.data(), pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), rets.data(),
                pointers.data() + args.size()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, input_block ? 1 : 0, &kind, &names, &attr};
  XLA_FFI_Error* error = target(&frame);
  if (error == nullptr) return "";
  const std::unique_ptr<std::string> message(reinterpret_cast<std::string*>(error));
  return *message;
}

}  // namespace fuzz

#endif  // HIRE_REWRITE_FRAME_H_
