// The machine's own limits: memcpy with several threads, and direct I/O by io_uring at a queue depth, as
// fio's ioengine=io_uring has it. No liburing, so that this file compiles wherever a C compiler is.

#include <errno.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_THREADS = 64 };

typedef struct {
    char *target;
    const char *source;
    size_t page_bytes, count;
    atomic_size_t next;  // threads take the next page that nobody has taken
} Copy;

static void *copy_pages(void *argument) {
    Copy *copy = argument;
    for (size_t page; (page = atomic_fetch_add(&copy->next, 1)) < copy->count;) {
        size_t at = page * copy->page_bytes;
        memcpy(copy->target + at, copy->source + at, copy->page_bytes);
    }
    return NULL;
}

int raw_copy(char *target, const char *source, size_t page_bytes, size_t count, int threads) {
    Copy copy = {.target = target, .source = source, .page_bytes = page_bytes, .count = count};
    pthread_t others[MAX_THREADS];
    if (threads < 1 || threads > MAX_THREADS) return EINVAL;
    int started = 0;
    while (started < threads - 1 && !pthread_create(&others[started], NULL, copy_pages, &copy)) started++;
    copy_pages(&copy);
    for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
    return 0;
}

typedef struct {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *memory;
    size_t memory_bytes, sqes_bytes;
} Ring;

static int open_ring(Ring *ring, unsigned depth) {
    struct io_uring_params params = {0};
    ring->fd = (int)syscall(SYS_io_uring_setup, depth, &params);
    if (ring->fd < 0) return errno;
    // Kernels since 5.4 map both queues at once.
    size_t sq = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->memory_bytes = sq > cq ? sq : cq;
    ring->sqes_bytes = params.sq_entries * sizeof(struct io_uring_sqe);
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    ring->memory = mmap(NULL, ring->memory_bytes, protection, flags, ring->fd, IORING_OFF_SQ_RING);
    void *sqes = mmap(NULL, ring->sqes_bytes, protection, flags, ring->fd, IORING_OFF_SQES);
    if (ring->memory == MAP_FAILED || sqes == MAP_FAILED) return ENOMEM;
    char *base = ring->memory;
    ring->sqes = sqes;
    ring->sq_tail = (unsigned *)(base + params.sq_off.tail);
    ring->sq_mask = (unsigned *)(base + params.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(base + params.sq_off.array);
    ring->cq_head = (unsigned *)(base + params.cq_off.head);
    ring->cq_tail = (unsigned *)(base + params.cq_off.tail);
    ring->cq_mask = (unsigned *)(base + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(base + params.cq_off.cqes);
    return 0;
}

static void close_ring(Ring *ring) {
    munmap(ring->sqes, ring->sqes_bytes);
    munmap(ring->memory, ring->memory_bytes);
    close(ring->fd);
}

typedef struct {
    int fd, write;
    char *memory;
    size_t page_bytes, request_bytes;
    const int64_t *slots;  // place of each page in the file, in pages
} Job;

static void queue_request(Ring *ring, const Job *job, size_t request) {
    size_t at = request * job->request_bytes;  // in memory; a page is a whole number of requests
    size_t page = at / job->page_bytes;
    unsigned tail = *ring->sq_tail, index = tail & *ring->sq_mask;
    struct io_uring_sqe *entry = &ring->sqes[index];
    memset(entry, 0, sizeof *entry);
    entry->opcode = job->write ? IORING_OP_WRITE : IORING_OP_READ;
    entry->fd = job->fd;
    entry->addr = (uint64_t)(uintptr_t)(job->memory + at);
    entry->len = (unsigned)job->request_bytes;
    entry->off = (uint64_t)job->slots[page] * job->page_bytes + at % job->page_bytes;
    ring->sq_array[index] = index;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

// How many requests have ended; the first error goes to `error`. A short transfer is one.
static unsigned take_ended(Ring *ring, const Job *job, int *error) {
    unsigned head = *ring->cq_head, first = head;
    unsigned tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    for (; head != tail; head++) {
        int result = ring->cqes[head & *ring->cq_mask].res;
        if (result != (int)job->request_bytes && !*error) *error = result < 0 ? -result : EIO;
    }
    __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    return head - first;
}

// 0 or an errno. Keeps `depth` requests in flight until all are done.
int raw_io(int fd, int write, char *memory, size_t page_bytes, const int64_t *slots, size_t count,
           size_t request_bytes, unsigned depth) {
    Job job = {fd, write, memory, page_bytes, request_bytes, slots};
    Ring ring = {0};
    int error = open_ring(&ring, depth);
    if (error) return error;
    size_t total = page_bytes * count / request_bytes, queued = 0, ended = 0;
    while (ended < total && !(error && ended == queued)) {
        unsigned fresh = 0;
        for (; !error && queued < total && queued - ended < depth; fresh++) {
            queue_request(&ring, &job, queued++);
        }
        long entered;
        do {
            entered = syscall(SYS_io_uring_enter, ring.fd, fresh, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        } while (entered < 0 && errno == EINTR);
        if (entered < 0) {
            error = errno;
            break;
        }
        ended += take_ended(&ring, &job, &error);
    }
    close_ring(&ring);
    return error;
}
