/* A folder for the shared memory of Open MPI. */
#ifndef IHA_KERNELS_COMM_MPI_SHARED_MEMORY_H
#define IHA_KERNELS_COMM_MPI_SHARED_MEMORY_H

/* Open MPI names the files of its shared memory /dev/shm/sm_segment.HOST.USER.JOB.RANK (up to version 4.1:
 * vader_segment), and opens one that exists as if it were its own. JOB is a hash of 16 bits of the process id of mpirun.
 * So two jobs of one user can get the same files, and then both crash: surely where containers share /dev/shm and
 * mpirun has the same process id in each, and otherwise once in about 65,000 pairs of jobs.
 *
 * Call this before MPI_Init: it makes a folder in /dev/shm of this process's own, and names it in the environment for
 * Open MPI, unless the user has named one. Folders that processes left which were killed are removed. Where anything
 * fails Open MPI's own choice stays. */
void mpi_shared_memory_open(void);

/* Remove the folder; after MPI_Finalize. */
void mpi_shared_memory_close(void);

#endif
